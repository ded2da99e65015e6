"""Serving with a real engine: what listens to it changes no text, and online texts are the batch's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.config import EngineConfig, JobConfig
from e2p_ray.engine import admission
from e2p_ray.engine import engine as engine_module
from e2p_ray.engine.engine import Engine, load_engine
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.errors import IncompatibleError
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.plan import make_plan, read_shard
from e2p_ray.results import UNPERSONALIZED_USER_ID
from e2p_ray.schema import Completion, Content, DeadLetter, ErrorCode, Generation, Group, Request, RequestKey, Status
from e2p_ray.serve import call as call_module
from e2p_ray.serve.call import Call, Job
from e2p_ray.serve.messages import GenerationAnswer
from e2p_ray.storage import Storage
from tests import tiny_models
from tests.listening import Listening
from tests.s3 import IS_LONG
from tests.serve_world import serve_config, serving
from tests.small_job import candidates_table, contents_table
from tests.tiny_models import EMBEDDING_DIM, engine_of, group, random_projector, save_model_folder, task

LLAMA = LlamaConfig(**tiny_models.common())


def groups_of(seed: int, num_contents: int = 5, first_user: int = 0) -> list[Group]:
    contents = tiny_models.contents(num_contents, seed=seed)
    return [group(content, range(first_user, first_user + 4), without=[first_user]) for content in contents]


class NobodyWaits:
    """A queue without anybody."""

    num_cancelled = 0

    def take(self, call: Call) -> list[Job]:
        return []

    def run_errands(self) -> None:
        pass

    def took(self, seconds_s: float) -> None:
        pass


def test_an_unpersonalised_text_that_nobody_waits_for_ends_with_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for beside many texts of one content; who came next had to wait for all of it."""
    monkeypatch.setattr(call_module, "MANY_REQUESTS", 2)
    [content] = tiny_models.contents(1)
    one = group(content, range(2))
    loaded: Any = object()
    jobs = [Job(loaded, content, one.task, request, "f") for request in one.requests]
    call = Call(NobodyWaits(), 8, jobs)
    assert [each.requests for each in call._next()] == [one.requests]
    for job in jobs:
        assert not call.cancelled(), "somebody may need it yet"
        call._give(DeadLetter(*job.request.key, ErrorCode.NON_FINITE_LOGITS, "", "", ""))
    assert call.cancelled() == {RequestKey(UNPERSONALIZED_USER_ID, *jobs[0].request.key[1:])}


def keys_of(groups: Sequence[Group]) -> list[RequestKey]:
    return [request.key for one in groups for request in one.requests]


def texts_of(completions: Iterator[Completion]) -> dict[RequestKey, Completion]:
    """Without log-probabilities: other neighbours, other rounding."""
    return {completion.key: replace(completion, mean_logprob=0.0) for completion in completions}


@pytest.fixture(params=["greedy", "sampled"])
def engine(request: pytest.FixtureRequest) -> Engine:
    sampling: dict[str, Any] = {} if request.param == "greedy" else {"temperature": 0.9, "seed": 3}
    return engine_of(LLAMA, tasks={"headline": task(max_new_tokens=12, **sampling)}, max_rows=8)


def test_streamed_texts_grow_into_the_completions(engine: Engine) -> None:
    groups = groups_of(1)
    plain = texts_of(engine.generate(groups))
    keys = keys_of(groups)
    engine.listener = listener = Listening(streamed=keys[::2])
    assert texts_of(engine.generate(groups)) == plain
    assert listener.texts.keys() == set(keys[::2]), "and nobody else's"
    for key, texts in listener.texts.items():
        grown = [*texts, plain[key].text]
        assert not any(text.endswith("\ufffd") for text in grown), "nothing of a character before its last byte"
        assert all(after.startswith(before) for before, after in itertools.pairwise(grown)), key
        assert len(set(grown)) > 3


@pytest.mark.parametrize("at_step", [1, 2, 5])
def test_cancelled_rows_leave_and_change_nobody_else_s_text(engine: Engine, at_step: int) -> None:
    groups = groups_of(2)
    plain, keys = texts_of(engine.generate(groups)), keys_of(groups)
    steps = engine.stats.num_steps
    gone = set(keys[1::3])
    engine.listener = Listening(cancelled=lambda step: gone if step >= at_step else ())
    found = texts_of(engine.generate(groups))
    assert found.keys() == plain.keys(), "still one completion a request"
    cancelled = {key for key, completion in found.items() if completion.error_code is ErrorCode.CANCELLED}
    assert cancelled <= gone
    assert cancelled, "the control: some were there to be cancelled"
    assert {key: found[key] for key in keys if key not in cancelled} == {
        key: plain[key] for key in keys if key not in cancelled
    }
    engine.listener = Listening(cancelled=lambda step: keys)
    before = engine.stats.num_steps
    assert {completion.error_code for completion in engine.generate(groups)} == {ErrorCode.CANCELLED}
    assert engine.stats.num_steps == before, "nothing is decoded for nobody"
    assert steps > 0, "the control"
    engine.listener = None
    assert texts_of(engine.generate(groups)) == plain, "and the engine is as it was"


def test_other_texts_can_be_written_between_two_steps(engine: Engine) -> None:
    """A batch that is interrupted at every sixth step, twice deep: its texts, and those of the others, are the same."""
    outer, inner, innermost = groups_of(3, 4), groups_of(4, 2, first_user=50), groups_of(5, 1, first_user=80)
    plain = [texts_of(engine.generate(groups)) for groups in (outer, inner, innermost)]
    found: list[dict[RequestKey, Completion]] = []

    def interrupt(step: int) -> None:
        if step % 6:
            return
        mine, engine.listener = engine.listener, Listening(between=interrupt_again)
        found.append(texts_of(engine.generate(inner)))
        engine.listener = mine

    def interrupt_again(step: int) -> None:
        if step == 4:
            mine, engine.listener = engine.listener, None
            assert texts_of(engine.generate(innermost)) == plain[2]
            engine.listener = mine

    engine.listener = Listening(between=interrupt)
    assert texts_of(engine.generate(outer)) == plain[0]
    assert len(found) >= 2, "the control: it was interrupted"
    assert all(texts == plain[1] for texts in found)
    assert plain[0] != plain[1]


def test_an_engine_for_other_samplings_writes_as_one_that_was_made_for_them(engine: Engine) -> None:
    groups = groups_of(6)
    tasks = {"headline": task(max_new_tokens=6, temperature=0.5, seed=11)}
    made = engine_of(LLAMA, tasks=tasks, max_rows=8)
    before = texts_of(engine.generate(groups))
    assert texts_of(engine.with_tasks(tasks).generate(groups)) == texts_of(made.generate(groups)) != before
    assert texts_of(engine.generate(groups)) == before


def test_another_projector_shares_the_prefixes_and_no_text(engine: Engine) -> None:
    groups = groups_of(7)
    before = texts_of(engine.generate(groups))
    computed = engine.stats.num_prefix_tokens
    other = engine.with_projector(random_projector(LLAMA.hidden_size, seed=2))
    after = texts_of(other.generate(groups))
    assert computed > 0
    assert other.stats.num_prefix_tokens == 0, "no content is read again"
    assert after != before
    assert texts_of(engine.generate(groups)) == before
    stranger = random_projector(LLAMA.hidden_size)
    stranger.manifest = stranger.manifest.__class__(
        **{name: getattr(stranger.manifest, name) for name in stranger.manifest.__slots__} | {"base_model_id": "x@1"}
    )
    with pytest.raises(IncompatibleError, match="x@1"):
        engine.with_projector(stranger)


def test_another_projector_gets_the_same_bounds_though_less_memory_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, told that it is a card with 64 GiB free, of which the running engine fills its share."""
    gpu, plain, held = torch.device("cuda"), admission.bounds_on, list[int]()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((64 << 30) - sum(held), 80 << 30))
    monkeypatch.setattr(engine_module, "bounds_on", lambda device, config: plain(gpu, config))
    config, base = EngineConfig(max_rows=8), BaseModel(tiny_models.random_model(LLAMA))
    made = Engine(base, random_projector(LLAMA.hidden_size), tiny_models.byte_tokenizer(), {"headline": task()}, config)
    given = made._decoder.bounds
    held.append(given.max_bytes // 2)
    assert plain(gpu, config) != given, "the control: with nothing handed on it would be less"
    assert made._decoder._admission.halve(8), "less for some time: that is not handed on either"
    for seed in (2, 3):
        made = made.with_projector(random_projector(LLAMA.hidden_size, seed=seed))
        assert made._decoder.bounds == given
    assert made.with_bounds(4, 1)._decoder.bounds.max_bytes == given.max_bytes // 2


# -- a whole service over a tiny model ---------------------------------------------------------------------------------


def tiny_job(folder: Path, num_users: int, num_contents: int, per_user: int) -> JobConfig:
    """A job with a real base model and projector, tables with every kind of user, and checks that some texts pass."""
    storage, rng = Storage(), np.random.default_rng(0)
    values = {
        "inputs": {f"{name}_uri": f"{folder}/in/{name}.parquet" for name in ("users", "contents", "candidates")},
        "output": {"uri": f"{folder}/out"},
        "base_model": {"uri": str(save_model_folder(LLAMA, folder / "base")), "device": "cpu"},
        "projector": {"uri": f"{folder}/projector"},
        "tasks": {
            "headline": task(max_new_tokens=10).model_dump(),
            "explanation": task(cue_before="\nFor you:", max_new_tokens=14, temperature=0.8, seed=5).model_dump(),
        },
        "engine": {"max_rows": 32, "num_threads": 1},
        "checks": {"language": False, "repetition": False, "foreign_names": False},
    }
    for name in ("headline", "explanation"):
        values["tasks"][name]["limits"] = {"must_finish": False}  # type: ignore[index]
        values["tasks"][name]["max_content_tokens"] = 80  # type: ignore[index]
    config = JobConfig.model_validate(values)
    vectors = rng.standard_normal((num_users, EMBEDDING_DIM)).astype(np.float32)
    users = {
        "user_id": [f"user-{n:04d}" for n in range(num_users)],
        "embedding": pa.array(
            [None if n % 10 == 1 else vector for n, vector in enumerate(vectors)],
            pa.list_(pa.float32(), EMBEDDING_DIM),
        ),
        "embedding_space": ["space-0" if n % 10 == 2 else "space-1" for n in range(num_users)],
        "personalize": [n % 10 != 0 for n in range(num_users)],
        "updated_at": pa.array([0] * num_users, pa.timestamp("us", "UTC")),
    }
    storage.write_table(config.inputs.users_uri, pa.table(users))
    storage.write_table(config.inputs.contents_uri, contents_table(num_contents))
    storage.write_table(config.inputs.candidates_uri, candidates_table(num_users, num_contents, per_user))
    save_projector(config, config.projector.uri, seed=1)
    return config


def save_projector(config: JobConfig, uri: str, seed: int, **trained: Any) -> str:
    """A random projector for the job's base model, of a training of which this is told; returns its id."""
    base = resolve_base_model(config.base_model, Storage())
    made = random_projector(LLAMA.hidden_size, seed=seed)
    values = {name: getattr(made.manifest, name) for name in made.manifest.__slots__}
    values |= {"base_model_id": base.base_model_id, "tokenizer_hash": base.tokenizer_hash, "trained": trained}
    projector = Projector(made.manifest.__class__(**values), made.reference)
    projector.load_state_dict(made.state_dict())
    return projector.save_pretrained(Storage(), uri).projector_id


def batch_rows(config: JobConfig) -> dict[RequestKey, Generation | DeadLetter]:
    """What the batch's own generator makes of the whole plan, shard by shard."""
    storage = Storage()
    loaded = LoadedGenerator(config, storage, "run", engine_factory=load_engine)
    plan = make_plan(config, storage, embedding_space="space-1", embedding_dim=EMBEDDING_DIM)
    found: dict[RequestKey, Generation | DeadLetter] = {}
    for shard in plan.shards:
        rows, dead_letters = loaded.generate(read_shard(storage, plan.uri, shard.shard_id))
        found |= {row.key: row for row in rows} | {letter.key: letter for letter in dead_letters}
    return found


SAME = ("text", "status", "reason", "personalized", "arm", "fingerprint", "finish_reason", "num_output_tokens",
        "num_prompt_tokens", "projector_id", "base_model_id", "prompt_id", "embedding_space")  # fmt: skip


def test_online_texts_are_the_batch_s_and_a_swap_changes_them_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, verdicts, fingerprints and counts, equal in every pair; sent alone, in batches and as streams."""
    tiny_models.write_letters_only(monkeypatch)
    torch.set_num_threads(1)
    config = tiny_job(tmp_path, *((170, 12, 3) if IS_LONG else (30, 6, 2)))
    wanted = batch_rows(config)
    assert len(wanted) >= 110
    statuses = [row.status for row in wanted.values() if isinstance(row, Generation)]
    assert all(statuses.count(status) > 3 for status in Status), "the control: every kind is there"
    other_uri = str(tmp_path / "projector-2")
    other_id = save_projector(config, other_uri, seed=2)
    with serving(serve_config(config), None) as site, site.client() as client:
        answers = dict[RequestKey, GenerationAnswer]()
        for name in config.tasks:
            keys = [key for key in wanted if key.task == name]
            pairs = [{"user_id": key.user_id, "content_id": key.content_id} for key in keys]
            for start in range(0, len(keys), 200):
                results = client.generate_batch(name, pairs[start : start + 200], timeout_ms=60_000).results
                for key, answer in zip(keys[start : start + 200], results, strict=True):
                    assert isinstance(answer, GenerationAnswer)
                    answers[key] = answer
            for key in keys[::9]:
                alone = client.generate(name, user_id=key.user_id, content_id=key.content_id)
                *_, streamed = client.stream(name, user_id=key.user_id, content_id=key.content_id)
                assert isinstance(streamed, GenerationAnswer)
                for field in SAME:
                    assert getattr(alone, field) == getattr(streamed, field) == getattr(answers[key], field)
        different = [
            (key, field) for key, row in wanted.items() for field in SAME
            if getattr(row, field) != getattr(answers[key], field)
        ]  # fmt: skip
        assert not different
        assert {answer.source for answer in answers.values()} == {"generated"}
        assert asyncio.run(site.service.swap(other_uri))
        key = next(k for k, row in wanted.items() if isinstance(row, Generation) and row.status is Status.OK)
        swapped = client.generate(key.task, user_id=key.user_id, content_id=key.content_id)
        assert swapped.projector_id == other_id
        assert swapped.fingerprint != answers[key].fingerprint
        changed = config.model_copy(update={"projector": config.projector.model_copy(update={"uri": other_uri})})
        again = batch_rows(changed)[key]
        assert isinstance(again, Generation)
        assert (swapped.text, swapped.status, swapped.fingerprint) == (again.text, again.status, again.fingerprint)
        (tmp_path / "projector-2" / "model.safetensors").write_bytes(b"damaged")
        assert asyncio.run(site.service.swap(config.projector.uri))
        assert not asyncio.run(site.service.swap(other_uri)), "a damaged artifact is refused"
        assert client.models().projector_id == answers[key].projector_id, "and the old one goes on"
        back = client.generate(key.task, user_id=key.user_id, content_id=key.content_id)
        assert back.text == answers[key].text
        scored = client.scores(key.task, [{"content_id": key.content_id, "text": back.text}], user_id=key.user_id)
        assert scored.scores[0].mean_logprob is not None


@pytest.mark.parametrize(
    ("prefixes", "wanted"), [({"en": " "}, " A bridge"), ({"default": "- "}, "- A bridge"), ({"ja": " "}, "A bridge")]
)
def test_candidates_are_scored_as_texts_began_in_training(
    prefixes: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    """Titles and given texts; one that begins so already stays as it is."""
    torch.set_num_threads(1)
    config = tiny_job(tmp_path, num_users=6, num_contents=2, per_user=1)
    save_projector(config, config.projector.uri, 1, settings={"training": {"target_prefix": prefixes}})
    content = Content("bridge", "A bridge", "The city opened a bridge.", "en-US")
    vector = np.linspace(-1, 1, EMBEDDING_DIM, dtype=np.float32)
    keys = [RequestKey(name, "bridge", "headline") for name in ("nobody", "user")]
    requests = (Request(keys[0], None), Request(keys[1], vector))
    loaded = LoadedGenerator(config, Storage(), "run", engine_factory=load_engine)

    def gain(text: str) -> float:
        scores = loaded.score([Group(content, "headline", requests)], dict.fromkeys(keys, text))
        found = {score.key: score.mean_logprob for score in scores}
        return found[keys[1]] - found[keys[0]]

    assert abs(gain(wanted) - gain(f"* {wanted}")) > 1e-3, "the control: what stands before it counts"
    inline = {"content_id": "bridge", "content": {"title": content.title, "body": content.body, "language": "en-US"}}
    with serving(serve_config(config), None) as site, site.client() as client:
        candidates = [inline, inline | {"text": content.title}, inline | {"text": wanted}]
        user = {"embedding": vector.tolist(), "embedding_space": "space-1"}
        found = client.scores("headline", candidates, **user).scores
    assert [score.gain for score in found] == [pytest.approx(gain(wanted), abs=1e-4)] * 3
