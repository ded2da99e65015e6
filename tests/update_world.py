"""A small world that is edited and run again and again, and a model in plain Python of what each run has to write."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

import jobs.steps
import jobs.whole_run
from e2p_ray.batch import BatchProgress, BatchSummary, EngineFactory, ShardOutcome, ShardWorker
from e2p_ray.batch.tally import Tally
from e2p_ray.commit import Run, pending_shards
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.manifest import ProjectorManifest, resolve_base_model
from e2p_ray.schema import Group
from e2p_ray.storage import Storage
from e2p_ray.update import Limits, UpdateJob
from jobs.whole_run import generate_run
from tests.small_job import BODY, DIM, SPACE, TITLE, fake_engine, write_projector, write_small_job

Key = tuple[str, str, str]
TASKS = ("explanation", "headline")
BUCKET_ROWS = 12  # so that even a small world has several buckets


def serial_batch(
    config: JobConfig,
    storage: Storage,
    run: Run,
    *,
    engine_factory: EngineFactory | None = None,
    on_progress: Callable[[BatchProgress], None] | None = None,
    max_seconds: float | None = None,
    max_dead_letters: int | None = None,
) -> BatchSummary:
    """`run_batch` with one worker in this process, so that many runs take no Ray."""
    pending = pending_shards(storage, run)
    tally = Tally(len(run.shard_ids), len(run.shard_ids) - len(pending), on_progress)
    if pending:
        worker = ShardWorker(config, storage, run, engine_factory, max_seconds)
        for shard_id in pending:
            (row,) = worker(pa.table({"shard_id": [shard_id], "first": [None], "end": [None]})).to_pylist()
            outcome = ShardOutcome(**row)
            assert not outcome.error_type, outcome
            tally.add(outcome)
    return tally.summary(pending_shards(storage, run))


@dataclass(frozen=True)
class User:
    """A row of the users table."""

    vector: tuple[float, ...] | None
    space: str = SPACE
    personalize: bool = True

    def state(self) -> object:
        """What of a user determines texts."""
        if not self.personalize:
            return "opted_out"
        if self.vector is None:
            return "embedding_null"
        return self.vector if self.space == SPACE else "embedding_other_space"


@dataclass(frozen=True)
class Text:
    """A row of the contents table."""

    title: str
    body: str
    language: str


@dataclass(frozen=True)
class Wanted:
    """Everything that a text is made of, one field a part."""

    content: Text
    user: object
    projector: str
    base_model: str
    prompt: str
    settings: str


@dataclass
class World:
    """Edit the dictionaries and `config`, then `run`; the tables are written anew each time."""

    folder: Path
    config: JobConfig
    users: dict[str, User] = field(default_factory=dict)
    contents: dict[str, Text] = field(default_factory=dict)
    candidates: dict[tuple[str, str], float] = field(default_factory=dict)  # the score; the rank is its opposite
    projector: str = "projector-1"
    base_model: str = "base-1"
    shown: dict[Key, Wanted] = field(default_factory=dict)  # what the published texts were made of
    calls: Counter[Key] = field(default_factory=Counter)  # of the engine in the last run, without users' stand-ins

    @property
    def storage(self) -> Storage:
        return Storage(self.config.storage)

    # -- what has to be

    def wanted(self) -> dict[Key, Wanted]:
        """Every request that can be planned, from the dictionaries alone."""
        return {
            (user, content, task): Wanted(
                self.contents[content],
                self.users[user].state(),
                self.projector,
                self.base_model,
                self._prompt(task, self.contents[content].language),
                json.dumps(
                    [
                        self.config.tasks[task].model_dump(mode="json", exclude={"prompts", "max_content_tokens"}),
                        self.config.checks.model_dump(mode="json"),
                        self.config.base_model.dtype,
                    ]
                ),
            )
            for user, content in self.candidates
            if user in self.users and content in self.contents
            for task in TASKS
        }

    def _prompt(self, task: str, language: str) -> str:
        found = self.config.tasks[task].prompts[language]
        return f"{self.config.tasks[task].max_content_tokens} {found.model_dump()}"

    def changed(self) -> set[Key]:
        return {key for key, wanted in self.wanted().items() if self.shown.get(key) != wanted}

    def causes(self) -> Counter[str]:
        """One cause a changed request: the first that applies."""
        contents, users = {key[1] for key in self.shown}, {key[0] for key in self.shown}
        wanted = self.wanted()
        return Counter(_cause(key, self.shown.get(key), wanted[key], users, contents) for key in self.changed())

    # -- what is

    def write(self) -> None:
        """The tables, the projector and the base model as they are now."""
        storage, ids, texts = self.storage, list(self.users), list(self.contents)
        moment = pa.timestamp("us", "UTC")
        vectors = [self.users[user].vector for user in ids]
        table = {
            "user_id": pa.array(ids, pa.string()),
            "embedding": pa.array(vectors, pa.list_(pa.float32(), DIM)),
            "embedding_space": pa.array([self.users[user].space for user in ids], pa.string()),
            "personalize": pa.array([self.users[user].personalize for user in ids], pa.bool_()),
            "updated_at": pa.array([0] * len(ids), moment),
        }
        storage.write_table(self.config.inputs.users_uri, pa.table(table))
        table = {"content_id": pa.array(texts, pa.string())}
        for name in ("title", "body", "language"):
            table[name] = pa.array([getattr(self.contents[content], name) for content in texts], pa.string())
        table["updated_at"] = pa.array([0] * len(texts), moment)
        storage.write_table(self.config.inputs.contents_uri, pa.table(table))
        pairs, scores = list(self.candidates), list(self.candidates.values())
        table = {
            "user_id": pa.array([user for user, _ in pairs], pa.string()),
            "content_id": pa.array([content for _, content in pairs], pa.string()),
            "rank": pa.array([round(-1000 * score) for score in scores], pa.int32()),
            "score": pa.array(scores, pa.float32()),
            "source": pa.array(["test"] * len(pairs), pa.string()),
        }
        storage.write_table(self.config.inputs.candidates_uri, pa.table(table))
        self._write_artifacts()

    def _write_artifacts(self) -> None:
        """Others with other names; the configuration's places stay the same."""
        (self.folder / "base" / "config.json").write_text(json.dumps({"name": self.base_model}), encoding="utf-8")
        base = resolve_base_model(self.config.base_model, self.storage)
        manifest = ProjectorManifest(
            embedding_dim=DIM,
            embedding_space=SPACE,
            d_model=4,
            base_model_id=base.base_model_id,
            tokenizer_hash=base.tokenizer_hash,
            output_rms=1.0,
            trained={"name": self.projector},
        )
        write_projector(self.storage, self.config.projector.uri, manifest)

    def engine(self, config: JobConfig, storage: Storage) -> FakeEngine:
        """The fake engine; `calls` counts what it is asked for."""
        engine = fake_engine(config, storage)
        generate = engine.generate

        def seen(groups: Iterable[Group | None]) -> Iterator[Group | None]:
            for group in groups:
                if group is not None:
                    self.calls.update(r.key for r in group.requests if r.key.user_id)
                yield group

        def counted(groups: Iterable[Group | None]) -> Any:
            return generate(seen(groups))

        engine.generate = counted  # type: ignore[method-assign]
        return engine

    def run(self, limits: Limits | None = None, **options: Any) -> Report:
        """Write the tables and run the job on them. `shown` is what the model says that a complete run shows."""
        self.write()
        self.calls.clear()
        report = generate_run(self.config, engine_factory=options.pop("engine", self.engine), limits=limits, **options)
        if limits is None and report.version is not None:
            self.shown = self.wanted()
        return report

    def table(self) -> DeltaTable:
        uri = self.config.output.table_uri
        return DeltaTable(uri, storage_options=self.storage.delta_options(uri))

    def rows(self) -> dict[Key, dict[str, Any]]:
        """What readers see, by key; no key may be there twice."""
        rows = self.table().to_pyarrow_table().to_pylist()
        found = {(row["user_id"], row["content_id"], row["task"]): row for row in rows}
        assert len(found) == len(rows)
        return found


def _cause(key: Key, old: Wanted | None, new: Wanted, users: set[str], contents: set[str]) -> str:
    if old is None:
        if key[1] not in contents:
            return "new_content"
        return "new_candidate" if key[0] in users else "new_user"
    for name, cause in (
        ("content", "content_changed"),
        ("user", "user_changed"),
        ("base_model", "base_model_changed"),
        ("projector", "projector_changed"),
        ("prompt", "prompt_changed"),
    ):
        if getattr(old, name) != getattr(new, name):
            return cause
    return "settings_changed"


def vector(seed: int) -> tuple[float, ...]:
    """A user embedding that float32 holds exactly."""
    return tuple(np.random.default_rng(seed).normal(size=DIM).astype(np.float32).tolist())


def content(number: int, note: str = "") -> Text:
    language = ("en", "ja")[number % 2]
    return Text(TITLE[language].format(n=number), BODY[language].format(n=number) + note, language)


def make_world(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, num_users: int = 12, num_contents: int = 6, **changes: Any
) -> World:
    """Not run yet. Of ten users one opted out and one has no user embedding; each has three candidates."""
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    monkeypatch.setattr(jobs.steps, "UpdateJob", lambda **values: UpdateJob(**values, bucket_rows=BUCKET_ROWS))
    # 64 buckets for some seventy rows: a quarter of a run's time went into empty ones (measured).
    monkeypatch.setattr("e2p_ray.commit.spool._NUM_BUCKETS_LOG2", 2)
    # Nor does anything lose its power here: 62 calls a run, a sixth of its time (measured).
    monkeypatch.setattr("os.fsync", lambda _: None)
    config, _ = write_small_job(
        folder, num_users=1, num_contents=1, per_user=1, **{"plan": {"requests_per_shard": 7}} | changes
    )
    world = World(folder, config)
    for n in range(num_users):
        world.users[f"user-{n:03d}"] = User(vector(n) if n % 10 != 1 else None, personalize=n % 10 != 0)
    for n in range(num_contents):
        world.contents[f"content-{n:02d}"] = content(n)
    for n, user in enumerate(world.users):
        for step in range(3):
            world.candidates[user, f"content-{(n + step) % num_contents:02d}"] = (n * 7 + step * 3) % 23 / 8
    return world


def with_task(config: JobConfig, task: str, section: str, values: Mapping[str, Any]) -> JobConfig:
    """The configuration with some values of one section of a task changed."""
    data = config.model_dump(mode="json")
    data["storage"] = {}
    data["tasks"][task][section] |= values
    return JobConfig.model_validate(data)


def edit_at_random(world: World, chance: random.Random) -> None:
    """A few edits of any kind."""
    for _ in range(chance.randint(1, 4)):
        user, text = chance.choice(sorted(world.users)), chance.choice(sorted(world.contents))
        pair = chance.choice(sorted(world.candidates))
        match chance.randrange(9):
            case 0:
                world.users[user] = replace(world.users[user], vector=vector(chance.randrange(1000)))
            case 1:
                world.users[user] = replace(world.users[user], personalize=not world.users[user].personalize)
            case 2:
                world.users[user] = replace(world.users[user], space=chance.choice([SPACE, "space-0"]))
            case 3:
                world.contents[text] = replace(world.contents[text], title=f"Title {chance.randrange(99)}")
            case 4 if len(world.candidates) > 9:
                del world.candidates[pair]
            case 5:
                world.candidates[user, text] = chance.random()
            case 6:
                world.users[f"new-{chance.randrange(9)}"] = User(vector(chance.randrange(1000)))
                world.candidates[f"new-{chance.randrange(9)}", text] = chance.random()
            case 7:
                number = chance.randrange(20, 29)
                world.contents[f"content-{number}"] = content(number)
                world.candidates[user, f"content-{number}"] = chance.random()
            case 8 if len(world.users) > 6:
                del world.users[user]
