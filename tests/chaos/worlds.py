"""Outputs as they are before a job that is to be killed, and what has to become of them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.config import JobConfig, StorageConfig
from e2p_ray.storage import Storage
from tests.chaos.conservation import Key, Seen, readers_see
from tests.chaos.forks import Forks, Job
from tests.chaos.steps import Step
from tests.small_job import TASKS, candidates_table, contents_table, users_table, write_small_job

NUM_USERS, NUM_CONTENTS, PER_USER = 24, 4, 3
OPTED_OUT = ("user-0003", "user-0005", "user-0016")  # between generation and publish


@dataclass(frozen=True)
class Scenario:
    """A job, the output before it, what readers see before it and after it, and the calls that it makes unharmed."""

    name: str
    config: JobConfig
    job: Job
    planned: Counter[Key]
    old: Seen | None
    new: Seen
    steps: tuple[Step, ...]
    saved: Path

    def restore(self) -> None:
        """The output as it was before the job, times and all."""
        out = Path(self.config.output.uri)
        shutil.rmtree(out, ignore_errors=True)
        if self.saved.exists():
            shutil.copytree(self.saved, out)


def planned_keys(
    num_users: int = NUM_USERS, num_contents: int = NUM_CONTENTS, per_user: int = PER_USER
) -> Counter[Key]:
    """Every request that can be written, from the input tables alone."""
    users = set(users_table(num_users)["user_id"].to_pylist())
    contents = set(contents_table(num_contents)["content_id"].to_pylist())
    table = candidates_table(num_users, num_contents, per_user)
    pairs = set(zip(table["user_id"].to_pylist(), table["content_id"].to_pylist(), strict=True))
    return Counter((user, text, task) for user, text in pairs if user in users and text in contents for task in TASKS)


def small_job(
    folder: Path, *, place: str | None = None, storage: StorageConfig | None = None, **changes: Any
) -> tuple[JobConfig, Path]:
    """A job of these sizes, and its file."""
    sizes: dict[str, Any] = {"num_users": NUM_USERS, "num_contents": NUM_CONTENTS, "per_user": PER_USER}
    return write_small_job(folder, place=place, storage=storage, **sizes, **changes)


def first(forks: Forks, folder: Path) -> Scenario:
    """jobs.generate where nothing is yet."""
    config, path = small_job(folder)
    return _scenario("first", forks, folder, config, Job("generate", str(path)))


def update(forks: Forks, folder: Path) -> Scenario:
    """jobs.generate over a published version: contents changed, a user opted out, the other rows are carried over."""
    config, path = small_job(folder)
    done(forks, Job("generate", str(path)))
    change_contents(config)
    opt_out(config, OPTED_OUT[:1])
    return _scenario("update", forks, folder, config, Job("generate", str(path)))


def publish(forks: Forks, folder: Path) -> Scenario:
    """jobs.publish of a run over an older version; users opted out since it was generated."""
    config, path = small_job(folder)
    done(forks, Job("generate", str(path)))
    change_contents(config)
    done(forks, Job("generate", str(path), ("--full", "--no-publish")))
    opt_out(config, OPTED_OUT)
    return _scenario("publish", forks, folder, config, Job("publish", str(path)))


def done(forks: Forks, job: Job) -> tuple[Step, ...]:
    """A job that nothing happens to."""
    ended = forks.run(job)
    assert ended.code == 0, ended.said[-4000:]
    return ended.steps


def change_contents(config: JobConfig) -> None:
    """Two contents get another text."""
    table = contents_table(NUM_CONTENTS)
    bodies = [("New. " if n < 2 else "") + body for n, body in enumerate(table["body"].to_pylist())]
    titles = [("New: " if n < 2 else "") + title for n, title in enumerate(table["title"].to_pylist())]
    table = table.set_column(1, "title", [titles]).set_column(2, "body", [bodies])
    Storage(config.storage).write_table(config.inputs.contents_uri, table)


def opt_out(config: JobConfig, user_ids: tuple[str, ...], num_users: int = NUM_USERS) -> None:
    """The users table, rewritten with these users' switches off."""
    table = users_table(num_users)
    stays = pc.and_(table["personalize"], pc.invert(pc.is_in(table["user_id"], pa.array(user_ids))))
    index = table.schema.get_field_index("personalize")
    Storage(config.storage).write_table(config.inputs.users_uri, table.set_column(index, "personalize", stays))


def _scenario(name: str, forks: Forks, folder: Path, config: JobConfig, job: Job) -> Scenario:
    out, saved = Path(config.output.uri), folder / "saved"
    if out.exists():
        shutil.copytree(out, saved)
    old = readers_see(config)
    steps = done(forks, job)
    new = readers_see(config)
    assert new is not None
    return Scenario(name, config, job, planned_keys(), old, new, steps, saved)
