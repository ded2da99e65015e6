"""The check at the end of every fault can fail: runs that are lost, doubled, foreign or half-visible are found."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake

import jobs.whole_run
from e2p_ray.config import JobConfig
from e2p_ray.schema import DEAD_LETTERS
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.chaos import worlds
from tests.chaos.conservation import Seen, assert_conserved, assert_old_or_new, readers_see
from tests.small_job import fake_engine
from tests.update_world import serial_batch


@dataclass(frozen=True)
class Published:
    """Two versions of a table; the second was made from other contents."""

    config: JobConfig
    old: Seen
    new: Seen

    @property
    def table(self) -> DeltaTable:
        return DeltaTable(self.config.output.table_uri)

    def rows(self) -> pa.Table:
        return self.table.to_pyarrow_table()

    def commit(self, rows: pa.Table, mode: str) -> None:
        """As one commit that says it is a publish of the new run."""
        properties = CommitProperties(custom_metadata={"run_id": self.new.run_id})
        options: Any = {"mode": mode, "commit_properties": properties}
        write_deltalake(self.config.output.table_uri, rows, **options)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    config, _ = worlds.small_job(tmp_path_factory.mktemp("twice"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)
        old = readers_see(config)
        worlds.change_contents(config)
        generate_run(config, engine_factory=fake_engine)
        new = readers_see(config)
        assert old is not None
        assert new is not None
        yield Published(config, old, new)


@pytest.fixture
def published(twice: Published, tmp_path: Path) -> Iterator[Published]:
    """The same, put back afterwards."""
    shutil.copytree(twice.config.output.uri, tmp_path / "saved")
    yield twice
    shutil.rmtree(twice.config.output.uri)
    shutil.copytree(tmp_path / "saved", twice.config.output.uri)


def lose(published: Published) -> None:
    published.commit(published.rows().slice(1), "overwrite")


def lose_and_double(published: Published) -> None:
    rows = published.rows()
    published.commit(pa.concat_tables([rows.slice(1), rows.slice(1, 1)]), "overwrite")


def double(published: Published) -> None:
    published.commit(published.rows().slice(5, 1), "append")


def invent(published: Published) -> None:
    rows = published.rows().slice(5, 1)
    published.commit(rows.set_column(0, rows.schema.field(0), pa.array(["user-9999"], rows["user_id"].type)), "append")


def bury(published: Published) -> None:
    """A dead letter of somebody who has a row."""
    row = published.rows().slice(3, 1).to_pylist()[0]
    run_uri = f"{published.config.output.uri}/runs/{published.new.run_id}"
    shard_id = next(Path(run_uri, "markers").iterdir()).stem
    letter = dict.fromkeys(DEAD_LETTERS.names, "x") | {k: row[k] for k in ("user_id", "content_id", "task")}
    table = pa.Table.from_pylist([letter], DEAD_LETTERS)
    Storage().write_table(f"{run_uri}/dead_letters/{shard_id}.parquet", table)


def empty_text(published: Published) -> None:
    rows = published.rows()
    texts = pa.array(["", *rows["text"].to_pylist()[1:]], rows["text"].type)
    published.commit(rows.set_column(rows.schema.get_field_index("text"), "text", texts), "overwrite")


def test_a_whole_run_passes(published: Published) -> None:
    conserved = assert_conserved(published.config, worlds.planned_keys())
    assert conserved.num_rows == worlds.planned_keys().total()
    assert assert_old_or_new(published.config, published.old, published.new)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(lose, "1 lost"), (lose_and_double, "1 lost"), (double, "1 there more than once"), (invent, "1 nobody planned"),
     (bury, "1 there more than once"), (empty_text, "an empty text")],
)  # fmt: skip
def test_what_is_wrong_is_found(harm: Callable[[Published], None], said: str, published: Published) -> None:
    harm(published)
    with pytest.raises(AssertionError, match=said):
        assert_conserved(published.config, worlds.planned_keys())
    if harm is not bury:  # which readers do not see
        with pytest.raises(AssertionError, match="neither the old nor the new"):
            assert_old_or_new(published.config, published.old, published.new)


def test_a_torn_publish_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish in two commits, each of half of the files: what the one commit is there to prevent."""
    publishing = importlib.import_module("e2p_ray.commit.publish")
    create = publishing.create_table_with_add_actions
    kept: list[Any] = []

    def torn(uri: str, schema: Any, actions: list[Any], **options: Any) -> None:
        kept.extend(actions[len(actions) // 2 :])
        create(uri, schema, actions[: len(actions) // 2], **options)

    config, _ = worlds.small_job(tmp_path)
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    monkeypatch.setattr(publishing, "create_table_with_add_actions", torn)
    generate_run(config, engine_factory=fake_engine)
    half = readers_see(config)
    assert half is not None
    with pytest.raises(AssertionError, match=r"\d+ lost"):
        assert_conserved(config, worlds.planned_keys())
    table = DeltaTable(config.output.table_uri)
    table.create_write_transaction(kept, "append", table.schema())
    whole = readers_see(config)
    assert whole is not None
    assert_conserved(config, worlds.planned_keys())
    assert assert_old_or_new(config, None, whole)
    DeltaTable(config.output.table_uri).restore(0)
    with pytest.raises(AssertionError, match="neither the old nor the new"):
        assert_old_or_new(config, None, whole)


def test_a_table_that_vanished_is_found(published: Published) -> None:
    shutil.rmtree(published.config.output.table_uri)
    with pytest.raises(AssertionError, match="the old run is gone"):
        assert_old_or_new(published.config, published.old, published.new)
    with pytest.raises(AssertionError, match="nothing is published"):
        assert_conserved(published.config, worlds.planned_keys())
