"""The training loop: going on from a state, stopping early, keeping the best, bfloat16, and shares of workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from e2p_ray.config import StorageConfig
from e2p_ray.engine.manifest import BaseModelFolder
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.storage import Storage
from e2p_ray.train.controls import derangement, score_controls
from e2p_ray.train.fit import Fit, draw
from e2p_ray.train.job.checkpoint import (
    Checkpoint,
    UnusableCheckpoint,
    checkpoint_uri,
    read_checkpoint,
    write_checkpoint,
)
from e2p_ray.train.lessons import LessonTable, Target, UserTable, make_lessons
from e2p_ray.train.projector import new_projector
from e2p_ray.train.records import StepRecord
from e2p_ray.train.score import score
from e2p_ray.train.settings import TrainSettings
from tests.tiny_models import byte_tokenizer, configs, contents, random_model, task

FOLDER = BaseModelFolder(Path("."), "tiny@0", "bytes")
TEXTS = {True: "a bridge for money", False: "the river, in peace"}
SETTINGS = TrainSettings(
    num_steps=12,
    contents_per_step=3,
    users_per_content=4,
    learning_rate=2e-2,
    warmup_steps=2,
    hidden_dim=16,
    validate_every=3,
)


@cache
def _base(dtype: torch.dtype = torch.float32) -> BaseModel:
    return BaseModel(random_model(configs()["llama"]).to(dtype))


def _users(num_users: int = 24) -> UserTable:
    vectors = np.random.default_rng(3).normal(size=(num_users, 6)).astype(np.float32)
    return UserTable([f"u{i}" for i in range(num_users)], vectors, "space")


def _lessons(settings: TrainSettings = SETTINGS) -> tuple[LessonTable, LessonTable]:
    """Eight contents to train on and two to validate on; a user's sign on one axis decides the text."""
    users = _users()
    targets = [
        Target(user, f"c{(i + shift) % 10}", "headline", TEXTS[bool(vector[0] > 0)])
        for i, (user, vector) in enumerate(zip(users.user_ids, users.user_embeddings, strict=True))
        for shift in (0, 3)
    ]
    parts = ([t for t in targets if t.content_id < "c8"], [t for t in targets if t.content_id >= "c8"])
    tables = [
        make_lessons(byte_tokenizer(), {"headline": task()}, users, contents(10), part, settings, 512)[0]
        for part in parts
    ]
    return tables[0], tables[1]


def _fit(settings: TrainSettings = SETTINGS, dtype: torch.dtype = torch.float32, **options: Any) -> Fit:
    training, validation = _lessons(settings)
    projector = new_projector(_base(dtype), FOLDER, _users(), settings)
    return Fit(_base(dtype), projector, training, settings, **{"validation": validation, **options})


def _curve(records: list[StepRecord]) -> list[float]:
    """All figures of all steps in a row."""
    return [v for r in records for v in (r.loss, r.gradient_norm, r.validation_loss, r.learning_rate) if v is not None]


def _weights(fit: Fit) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in fit.projector.state_dict().items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_going_on_from_a_state_equals_not_stopping(dropout: float) -> None:
    settings = replace(SETTINGS, dropout=dropout)
    whole = _fit(settings)
    list(whole.run())

    first = _fit(settings)
    steps = first.run()
    for _ in range(7):
        next(steps)
    tensors, values = first.state()
    torch.manual_seed(99)  # whatever else happened in the process must not matter
    second = _fit(settings)
    second.load_state(load(save(tensors)), json.loads(json.dumps(values)))
    assert second.num_steps_done == 7
    list(second.run())
    # The same but for rounding: a content's keys and values are computed in another company after the restart.
    same = pytest.approx(_curve(whole.records), rel=1e-5)
    assert _curve(second.records) == same
    assert [r.step for r in second.records] == list(range(1, 13))
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(second)[name], value, rtol=1e-4, atol=1e-5)
    for name, value in whole.finish().state_dict().items():
        torch.testing.assert_close(second.finish().state_dict()[name], value, rtol=1e-4, atol=1e-5)

    control = _fit(settings)
    control.load_state({n: v for n, v in tensors.items() if not n.startswith("optimizer.")}, values)
    list(control.run())
    assert _curve(control.records) != same, "without the optimizer's moments it goes elsewhere"


def test_another_seed_gives_another_curve() -> None:
    whole, other = _fit(), _fit(replace(SETTINGS, seed=1))
    assert [r.loss for r in whole.run()] != [r.loss for r in other.run()]


def test_stopping_early_keeps_the_best_projector() -> None:
    """The best of all steps, found again by scoring the projector as it was at every validation."""
    settings = replace(SETTINGS, num_steps=60, learning_rate=0.3, warmup_steps=0, validate_every=1, patience=4)
    fit = _fit(settings)
    seen: list[tuple[float, dict[str, torch.Tensor]]] = []
    for record in fit.run():
        assert record.validation_loss is not None
        seen.append((record.validation_loss, _weights(fit)))
    losses = [loss for loss, _ in seen]
    best = int(np.argmin(losses))
    assert len(seen) == best + 1 + 4 < 60, "four validations without a better loss, then it stops"
    assert fit.finished
    kept = fit.finish().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in seen[best][1].items())
    assert not all(torch.equal(value, kept[name]) for name, value in seen[-1][1].items()), "control: not the last"
    assert score(_base(), fit.projector, _lessons()[1], PrefixStore(_base(), 1 << 24)).mean_nll == pytest.approx(
        min(losses), rel=1e-6
    )


def test_bfloat16_stays_close_to_float32() -> None:
    wide, narrow = _fit(), _fit(dtype=torch.bfloat16)
    before = _base(torch.bfloat16).weights_hash()
    losses = [np.array([r.loss for r in fit.run()]) for fit in (wide, narrow)]
    assert np.abs(losses[0] - losses[1]).max() < 0.05 * losses[0].max()
    assert (losses[0] != losses[1]).any(), "control: it was another type"
    assert all(p.dtype == torch.float32 for p in narrow.projector.parameters()), "the projector itself stays float32"
    assert _base(torch.bfloat16).weights_hash() == before
    improved = losses[1][0] - losses[1][-1]
    assert improved > 0.5 * (losses[0][0] - losses[0][-1]) > 0


def test_a_record_counts_tokens_whatever_their_weight() -> None:
    training, _ = _lessons()
    light = replace(training, weight=np.full(training.num_rows, 0.01, np.float32))
    projector = new_projector(_base(), FOLDER, _users(), SETTINGS)
    fit = Fit(_base(), projector, light, SETTINGS)
    wanted = [
        sum(len(row.target) for lesson in draw(light, SETTINGS, step, 0, 1) for row in lesson.rows)
        for step in range(12)
    ]
    assert [record.num_tokens for record in fit.run()] == wanted
    plain = _fit()
    assert [record.num_tokens for record in plain.run()] == wanted, "control: with a weight of 1"
    assert [r.loss for r in fit.records] == pytest.approx([r.loss for r in plain.records], rel=1e-4)


def test_shares_of_workers_make_up_the_whole() -> None:
    """What two workers draw is what one with twice the contents draws, and their scores add up."""
    training, _ = _lessons()
    double = replace(SETTINGS, contents_per_step=6)
    for step in range(5):
        both = [lesson.left for rank in range(2) for lesson in draw(training, SETTINGS, step, rank, 2)]
        alone = [lesson.left for lesson in draw(training, double, step, 0, 1)]
        assert sorted(both) == sorted(alone)
    store, projector = PrefixStore(_base(), 1 << 24), new_projector(_base(), FOLDER, _users(), SETTINGS).eval()
    whole = score(_base(), projector, training, store)
    shares = [score(_base(), projector, training, store, rank=rank, size=3) for rank in range(3)]
    np.testing.assert_allclose(sum(share.nll for share in shares), whole.nll, rtol=1e-5)
    assert all((share.nll == 0).any() for share in shares), "control: no share is the whole"


@pytest.mark.parametrize("with_soft_token", [True, False])
def test_scoring_holds_no_more_prefixes_than_the_store_may_keep(
    with_soft_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a first validation, where most contents have one target."""
    users, many = _users(), contents(300)
    targets = [
        Target(users.user_ids[at % 24], content.content_id, "headline", TEXTS[at % 2 == 0])
        for at, content in enumerate(many)
    ]
    table, _ = make_lessons(byte_tokenizer(), {"headline": task()}, users, many, targets, SETTINGS, 512)
    projector = new_projector(_base(), FOLDER, users, SETTINGS).eval() if with_soft_token else None
    held: list[int] = []
    plain = PrefixStore.get

    def watched(self: PrefixStore, lefts: Sequence[tuple[int, ...]], *rest: Any) -> list[Any]:
        held.append(self.bytes_of(sum(map(len, lefts))))
        return plain(self, lefts, *rest)

    monkeypatch.setattr(PrefixStore, "get", watched)
    whole = score(_base(), projector, table, PrefixStore(_base(), 1 << 30))
    longest = _base().kv_bytes_per_token * int(np.diff(table.lefts.starts).max())
    most, num_whole = max(held), len(held)
    assert most > 20 * longest, "control: without need they go together"
    for max_bytes in (10 * longest, longest // 2):
        held.clear()
        found = score(_base(), projector, table, PrefixStore(_base(), max_bytes))
        assert max(held) <= max(max_bytes, longest)
        np.testing.assert_allclose(found.nll, whole.nll, rtol=1e-5)
    assert len(held) == 300 > num_whole, "at least one content in every pass"
    held.clear()
    score(_base(), projector, table, PrefixStore(_base(), 0), max_bytes=10 * longest)
    assert longest < max(held) <= 10 * longest, "a store that keeps nothing has no bound of its own"


def test_controls_take_the_user_away() -> None:
    fit = _fit(replace(SETTINGS, num_steps=40))
    list(fit.run())
    _, validation = _lessons()
    scores = score_controls(fit, fit.finish(), validation)
    mean = {name: nll.sum() / scores.num_tokens.sum() for name, nll in scores.nll.items()}
    assert mean["right"] == pytest.approx(fit.best_loss, rel=1e-5)
    assert mean["right"] < mean["shuffled"]
    average = np.repeat(_users().user_embeddings.mean(0, keepdims=True), len(_users().user_ids), axis=0)
    store = PrefixStore(_base(), 1 << 24)
    again = score(_base(), fit.projector, replace(validation, user_embeddings=average), store)
    assert mean["mean"] == pytest.approx(again.mean_nll, rel=1e-4)
    assert mean["none"] == pytest.approx(score(_base(), None, validation, store).mean_nll, rel=1e-5)
    assert len({round(value, 4) for value in mean.values()}) == 4, "control: they differ"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_nobody_gets_their_own_soft_token_back(size: int) -> None:
    order = derangement(size, seed=0)
    assert sorted(order) == list(range(size))
    assert size == 1 or (order != np.arange(size)).all()


def test_a_checkpoint_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    storage, uri = Storage(StorageConfig()), checkpoint_uri(str(tmp_path), "abc")
    assert read_checkpoint(storage, uri, "abc") is None
    fit = _fit()
    next(fit.run())
    tensors, values = fit.state()
    write_checkpoint(storage, uri, "abc", Checkpoint(tensors, values | {"seconds_s": 1.5}))
    found = read_checkpoint(storage, uri, "abc")
    assert isinstance(found, Checkpoint)
    assert found.values == values | {"seconds_s": 1.5}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())

    whole = storage.read_bytes(uri)
    changed = bytearray(whole)
    changed[-3] ^= 1
    for data in (whole[:-5], whole[: len(whole) // 2], b"", b"no tensors at all", bytes(changed), save(tensors)):
        storage.write_bytes(uri, data)
        refused = read_checkpoint(storage, uri, "abc")
        assert refused == UnusableCheckpoint("it is damaged"), len(data)
    storage.write_bytes(uri, whole)
    other = read_checkpoint(storage, uri, "def")
    assert other == UnusableCheckpoint("it belongs to the training abc")
