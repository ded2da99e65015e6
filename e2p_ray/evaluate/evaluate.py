"""The evaluation of one projector: every method on the same held-out pairs, measured in one go."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import polars as pl
import torch

from e2p_ray.config import EvaluateConfig
from e2p_ray.downstream.evaluation import Evaluation, summarise
from e2p_ray.engine.manifest import ProjectorManifest, check_compatible, read_manifest, resolve_base_model
from e2p_ray.engine.model import BaseModel, pick_device
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.errors import ConfigError
from e2p_ray.evaluate.baselines import refuse_long_profiles, refuse_without_profiles, score_baseline
from e2p_ray.evaluate.contest import Contest, Say, Scored
from e2p_ray.evaluate.controls import score_controls, train_constant
from e2p_ray.evaluate.data import EvaluationData, read_data
from e2p_ray.evaluate.drift import measure_drift, read_changed
from e2p_ray.evaluate.impressions import ranked_impressions, shown_targets
from e2p_ray.evaluate.retrieval import retrieval_matrices
from e2p_ray.evaluate.writing import Written, write_texts
from e2p_ray.plan.inputs import Space
from e2p_ray.storage import Storage
from e2p_ray.train.lessons import make_lessons
from e2p_ray.train.projector import check_frozen
from e2p_ray.train.settings import TrainSettings


def evaluate(config: EvaluateConfig, storage: Storage, say: Say) -> Evaluation:
    """Train the controls, score and write, measure. The base model is proven unchanged at the end.

    Raises ConfigError, InputError or IncompatibleError for what does not fit together, before a model is loaded.
    """
    manifest = read_manifest(storage, config.projector.uri)
    refuse_other_prompts(config, manifest)
    folder = resolve_base_model(config.base_model, storage)
    check_compatible(manifest, folder)
    space = Space(manifest.embedding_space, manifest.embedding_dim)
    data = read_data(config, storage, space)
    refuse_without_profiles(config, data)
    changed = read_changed(config, storage, space, data, say)
    device = pick_device(config.base_model.device)
    if device.type == "cpu" and config.engine.num_threads is not None:
        torch.set_num_threads(config.engine.num_threads)
    base = BaseModel.load(folder.path, config.base_model.dtype, device)
    contest = _contest(config, storage, base, data, say)
    say(
        f"{contest.table.num_rows:,} held-out targets of {len(contest.table):,} contents; "
        f"{data.share_seen_contents:.0%} of them on contents that were trained on"
    )
    refuse_long_profiles(contest)
    drift = measure_drift(contest, changed)  # first: embeddings far away may give losses that are no numbers
    before = base.weights_hash()
    constant = train_constant(contest)
    scored = score_controls(contest, constant)
    scored += [score_baseline(contest, method) for method in config.evaluation.methods]
    written = write_texts(contest, constant)
    found = summarise(
        pl.concat(contest.frame(one) for one in scored),
        [_timed(one, written).cost for one in scored],
        retrieval=retrieval_matrices(contest, constant) if config.evaluation.num_retrieval_texts else (),
        texts=None if written is None else written.texts,
        ranking=ranked_impressions(contest),
        drift=drift,
        allow=config.checks.allow,
        about=_about(contest),
        seed=config.evaluation.seed,
    )
    check_frozen(base, before)
    return found


def _contest(config: EvaluateConfig, storage: Storage, base: BaseModel, data: EvaluationData, say: Say) -> Contest:
    projector = Projector.from_pretrained(storage, config.projector.uri).to(base.device)
    folder = resolve_base_model(config.base_model, storage)
    tokenizer = load_tokenizer(folder.path)
    settings = control_settings(config, projector)
    given = (tokenizer, config.tasks, data.users, list(data.contents.values()))
    table, unfit = make_lessons(*given, data.held_out, settings, base.max_positions)
    skipped = Counter(data.num_skipped) + Counter(unfit)
    for reason, count in skipped.items():
        say(f"skipped {count:,} held-out targets: {reason}")
    shown = None
    if data.impressions is not None:
        try:
            shown, _ = make_lessons(*given, shown_targets(config, data.impressions), settings, base.max_positions)
        except ConfigError as error:
            raise ConfigError(f"inputs.impressions_uri: {error}. Or leave this input out") from error
    return Contest(config, base, folder, tokenizer, projector, settings, data, table, shown, skipped, say)


def control_settings(config: EvaluateConfig, projector: Projector) -> TrainSettings:
    """How the controls are trained: the projector's own recorded settings, then what the configuration sets."""
    manifest = projector.manifest
    known = {item.name for item in fields(TrainSettings)}
    recorded = manifest.trained.get("settings", {})
    own = {name: value for name, value in recorded.get("training", {}).items() if name in known}
    num_workers = recorded.get("workers", {}).get(
        "num_workers", 1
    )  # what they trained on together, one process trains on here
    own["contents_per_step"] = own.get("contents_per_step", TrainSettings().contents_per_step) * num_workers
    given = {name: getattr(config.training, name) for name in config.training.model_fields_set if name in known}
    return replace(
        TrainSettings(**(own | given)),
        kind=manifest.kind,
        layout=manifest.layout,
        hidden_dim=manifest.hidden_dim,
        num_soft_tokens=manifest.num_soft_tokens,
    )


def refuse_other_prompts(config: EvaluateConfig, manifest: ProjectorManifest) -> None:
    """ConfigError when a task's prompts are not those that the projector was trained with, where it says them."""
    recorded = manifest.trained.get("settings", {}).get("tasks", {})
    for name, task in config.tasks.items():
        trained = recorded.get(name, {}).get("prompts")
        if trained is not None and trained != task.model_dump(mode="json")["prompts"]:
            raise ConfigError(
                f"tasks.{name}.prompts: projector {manifest.projector_id} was trained with other prompts. A "
                "soft token is trained for one place in one prompt: give the prompts of its train.yaml"
            )


def _timed(one: Scored, written: Written | None) -> Scored:
    if written is None or one.method not in written.latency_ms:
        return one
    return replace(one, cost=replace(one.cost, latency_ms=written.latency_ms[one.method]))


def _about(contest: Contest) -> dict[str, str]:
    manifest, settings = contest.projector.manifest, contest.settings
    impressions = "none"
    if contest.data.impressions is not None and contest.shown is not None:
        num = contest.data.impressions[contest.shown.source]["impression_id"].n_unique()
        left_out = (
            f"{contest.data.num_trained_impressions:,} left out, as the projector was trained on a pair of theirs"
        )
        impressions = f"{num:,}; {left_out}"
    cue = "after" if any(p.cue_after for task in contest.tasks.values() for p in task.prompts.values()) else "before"
    return {
        "projector": f"{manifest.projector_id} ({manifest.kind}, {manifest.num_soft_tokens} soft token(s), "
        f"{manifest.layout}, cue {cue} the soft token)",
        "base model": f"{manifest.base_model_id} ({contest.config.base_model.dtype})",
        "embedding space": f"{manifest.embedding_space} ({manifest.embedding_dim} dimensions)",
        "held-out targets": f"{contest.table.num_rows:,} of {len(contest.table):,} contents, "
        f"{contest.data.share_seen_contents:.0%} on contents that were trained on",
        "skipped": ", ".join(f"{count:,} {reason}" for reason, count in contest.skipped.items()) or "none",
        "impressions": impressions,
        "trained controls": f"{len(contest.data.training):,} targets, {settings.num_steps:,} steps, learning rate "
        f"{settings.learning_rate:g}",
        "hardware": f"{contest.base.device.type}, {torch.get_num_threads()} threads",
    }
