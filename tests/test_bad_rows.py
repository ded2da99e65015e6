"""One per cent of every kind of bad row: every good row is published, every bad one is accounted for by its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from e2p_ray.schema import Arm, ErrorCode, Reason, Status
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.small_job import BODY, DIM, SPACE, TASKS, fake_engine, write_small_job

NUM_PAIRS = 2000
NUM_CONTENTS = 40
NUM_OF_EACH = NUM_PAIRS // 100

_NAN, _INF = float("nan"), float("inf")
# kind of user -> fields that differ from a good user's, outcome
USER_KINDS: dict[str, tuple[dict[str, Any], tuple[Status, Reason]]] = {
    "opted out": ({"personalize": False}, (Status.SUPPRESSED, Reason.OPTED_OUT)),
    "switch never set": ({"personalize": None}, (Status.SUPPRESSED, Reason.OPTED_OUT)),
    "null": ({"embedding": None}, (Status.FALLBACK, Reason.EMBEDDING_NULL)),
    "NaN": ({"embedding": [_NAN] * DIM}, (Status.FALLBACK, Reason.EMBEDDING_NON_FINITE)),
    "Inf": ({"embedding": [_INF] + [1.0] * (DIM - 1)}, (Status.FALLBACK, Reason.EMBEDDING_NON_FINITE)),
    "wrong size": ({"embedding": [1.0] * (DIM + 1)}, (Status.FALLBACK, Reason.EMBEDDING_WRONG_SIZE)),
    "zero": ({"embedding": [0.0] * DIM}, (Status.FALLBACK, Reason.EMBEDDING_ZERO)),
    "other space": ({"embedding_space": "space-0"}, (Status.FALLBACK, Reason.EMBEDDING_OTHER_SPACE)),
}
_TIME = pa.timestamp("us", "UTC")


class World:
    """The tables, and what must become of every pair, worked out while they are made."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.users: list[dict[str, Any]] = []
        self.pairs: list[tuple[str | None, str | None]] = []
        self.expected: dict[tuple[str, str], tuple[str, str | None]] = {}
        self._add_users()
        self._add_bad_pairs()

    def _add_user(self, **fields: Any) -> str:
        user_id = f"user-{len(self.users):05d}"
        row = {
            "user_id": user_id,
            "embedding": self.random.standard_normal(DIM).astype(np.float32).tolist(),
            "embedding_space": SPACE,
            "personalize": True,
            "updated_at": 1_700_000_000_000_000,
        }
        self.users.append({**row, **fields})
        return user_id

    def _add_users(self) -> None:
        kinds = [kind for kind in USER_KINDS for _ in range(NUM_OF_EACH)]
        kinds += [""] * (NUM_PAIRS - len(kinds))
        for number, kind in enumerate(kinds):
            fields, outcome = USER_KINDS.get(kind, ({}, (Status.OK, None)))
            pair = (self._add_user(**fields), f"content-{number % NUM_CONTENTS:03d}")
            self.pairs.append(pair)
            self.expected[pair] = outcome

    def _add_bad_pairs(self) -> None:
        for number in range(NUM_OF_EACH):
            good = [self._add_user() for _ in range(5)]
            self._expect((f"nobody-{number}", "content-000"), ErrorCode.UNKNOWN_USER)
            self._expect((good[0], f"content-gone-{number}"), ErrorCode.MISSING_CONTENT)
            self._expect((good[1], "content-nothing"), ErrorCode.EMPTY_CONTENT)
            self._expect((good[2], "content-title-only"), Status.FALLBACK, Reason.EMPTY_BODY)
            self._expect((good[3], "content-endless"), Status.OK)
            self.pairs.append((good[4], None))
            self.expected[good[4], ""] = (ErrorCode.NULL_KEY, None)
            self.pairs.append(self.pairs[-20])  # said before

    def _expect(self, pair: tuple[str, str], outcome: str, reason: str | None = None) -> None:
        self.pairs.append(pair)
        self.expected[pair] = (outcome, reason)

    def tables(self) -> dict[str, pa.Table]:
        contents: list[dict[str, Any]] = [
            {"content_id": f"content-{n:03d}", "title": f"Bridge {n} opens", "body": BODY["en"].format(n=n)}
            for n in range(NUM_CONTENTS)
        ]
        contents += [
            {"content_id": "content-nothing", "title": " ", "body": None},
            {"content_id": "content-title-only", "title": "Only a title", "body": ""},
            {"content_id": "content-endless", "title": "Long", "body": BODY["en"].format(n=1) * 2000},
        ]
        rows = [content | {"language": "en", "updated_at": 1_700_000_000_000_000} for content in contents]
        pairs = [{"user_id": user, "content_id": content, "rank": 1} for user, content in self.pairs]
        candidates = [pair | {"score": 0.5, "source": "test"} for pair in pairs]
        users = pa.schema(
            {
                "user_id": pa.string(),
                "embedding": pa.list_(pa.float32()),
                "embedding_space": pa.string(),
                "personalize": pa.bool_(),
                "updated_at": _TIME,
            }
        )
        return {
            "users": pa.Table.from_pylist(self.users, users),
            "contents": pa.Table.from_pylist(rows).cast(
                pa.schema(
                    [(name, pa.string()) for name in ("content_id", "title", "body", "language")]
                    + [("updated_at", _TIME)]
                )
            ),
            "candidates": pa.Table.from_pylist(candidates),
        }


@pytest.mark.usefixtures("ray_cluster")
def test_every_row_ends_as_it_must(tmp_path: Path) -> None:
    config, _ = write_small_job(
        tmp_path, plan={"requests_per_shard": 500}, gates={"max_fallback_share": 0.2, "max_same_text_share": 1.0}
    )
    storage, world = Storage(config.storage), World()
    for name, table in world.tables().items():
        storage.write_table(getattr(config.inputs, f"{name}_uri"), table)
    report = generate_run(config, engine_factory=fake_engine)

    published = pl.read_delta(config.output.table_uri)
    letters = [
        tuple(row[name] for name in ("user_id", "content_id", "task", "error_code"))
        for folder in (f"{config.output.uri}/plans", f"{config.output.uri}/runs/{report.run_id}/dead_letters")
        for item in storage.list_objects(folder)
        if "dead_letters" in item.uri
        for row in storage.read_table(item.uri).to_pylist()
    ]
    found: dict[tuple[str, str, str], tuple[str, str | None]] = {}
    for user, content, task, status, reason in published.select(
        "user_id", "content_id", "task", "status", "reason"
    ).iter_rows():
        assert (user, content, task) not in found, "published twice"
        found[user, content, task] = (status, reason)
    for user, content, task, code in letters:
        assert (user, content, task) not in found, "published and a dead letter, or two dead letters"
        found[user, content, task] = (code, None)
    expected = {(*pair, task): outcome for pair, outcome in world.expected.items() for task in TASKS}
    assert found == expected
    personalised = published.filter(pl.col("personalized"))
    assert set(personalised["arm"]) == {Arm.SOFT_TOKEN}
    assert set(personalised["status"]) == {Status.OK}
