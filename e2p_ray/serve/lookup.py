"""Users, contents and published rows by id, as the batch would read them, from copies that are kept fresh."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit import read_published
from e2p_ray.commit.published import open_table
from e2p_ray.config import ServeConfig
from e2p_ray.errors import ConfigError, E2PError, StorageError
from e2p_ray.plan.inputs import COLUMNS, Space, content_rows, latest, user_rows
from e2p_ray.schema import GENERATIONS, Content, Reason, UserEmbedding, validate_schema
from e2p_ray.serve.copies import Budget, Copies, Freshness
from e2p_ray.serve.log import ReplicaLog
from e2p_ray.serve.messages import Consent
from e2p_ray.storage import ObjectInfo, Storage

# A row found is kept as it was made of Arrow, which takes milliseconds: some MiB of users of 256 dimensions.
_MAX_KEPT_USERS = 4096
_MAX_KEPT_CONTENTS = 1024
# Pauses of a table without room double up to so many: each try copies what fits before it fails.
_MAX_PAUSES = 16


@dataclass(frozen=True, eq=False)
class User:
    """A user as the current table has it; without consent there is no user embedding."""

    consent: Consent
    user_embedding: UserEmbedding | None = None  # (d,)
    reason: Reason | None = None


@dataclass(frozen=True)
class Published:
    """What the published table shows for a request."""

    row: dict[str, object]  # the columns of GENERATIONS

    @property
    def text(self) -> str:
        return str(self.row["text"])

    @property
    def fingerprint(self) -> str:
        return str(self.row["fingerprint"])


class Tables:
    """The copies of the three tables, and the threads that keep them fresh: no table waits for another one's copy."""

    def __init__(self, config: ServeConfig, storage: Storage, log: ReplicaLog) -> None:
        self._config, self._storage, self._log = config, storage, log
        self.budget, folder = Budget(config.tables.max_bytes), config.tables.folder
        self._users = Copies(
            storage, ["user_id"], COLUMNS["users"], self.budget, folder,
            check=lambda schema, uri: validate_schema("users", schema, uri), change=_without_refused,
        )  # fmt: skip
        self._contents = Copies(
            storage, ["content_id"], COLUMNS["contents"], self.budget, folder,
            check=lambda schema, uri: validate_schema("contents", schema, uri),
        )  # fmt: skip
        self._published = Copies(storage, ["user_id", "content_id", "task"], GENERATIONS.names, self.budget, folder)
        self.version: int | None = None  # of the published table
        self._user: Callable[[str, Space, int], User] = lru_cache(_MAX_KEPT_USERS)(self._read_user)
        self._content: Callable[[str, int], Content | None] = lru_cache(_MAX_KEPT_CONTENTS)(self._read_content)
        self._refreshes = {
            "users": self._refresh_users,
            "contents": self._refresh_contents,
            "published": self._refresh_published,
        }
        self._fresh = {name: Freshness() for name in self._refreshes}
        self._looking = {name: threading.Lock() for name in self._refreshes}
        self._over = threading.Event()

    def open(self) -> None:
        """Copy everything, and keep each table fresh from its copy on; raises what is wrong with a table."""
        for name in self._refreshes:
            self._refresh(name)
            threading.Thread(target=self._keep_fresh, args=(name,), name=f"table-{name}", daemon=True).start()
        self._say_what_has_no_room()

    def close(self) -> None:
        """Stop refreshing."""
        self._over.set()

    def refresh(self) -> None:
        """Look for changes, and take them over."""
        for name in self._refreshes:
            self._refresh(name)

    def ages_s(self) -> dict[str, float]:
        """How old what is known of each table can be."""
        return {name: fresh.age_s for name, fresh in self._fresh.items()}

    @property
    def are_fresh(self) -> bool:
        """Whether users and contents are within their limit."""
        ages = self.ages_s()
        return max(ages["users"], ages["contents"]) <= self._config.tables.max_staleness_s

    def user(self, user_id: str, space: Space) -> User:
        """A user for a projector of this embedding space."""
        if self._fresh["users"].age_s > self._config.tables.max_staleness_s:
            return User(Consent.UNKNOWN)
        return self._user(user_id, space, self._users.state)

    def _read_user(self, user_id: str, space: Space, _state: int) -> User:
        rows = self._users.find(user_id)
        if not rows:
            return User(Consent.UNKNOWN)
        frame = latest(pl.concat([user_rows(row, space) for row in rows]), "user_id")
        (row,) = frame.iter_rows(named=True)
        if row["opted_out"]:
            return User(Consent.REFUSED)
        reason = None if row["reason"] is None else Reason(row["reason"])
        vector = None if reason else np.frombuffer(row["user_embedding"], "<f4")
        return User(Consent.GIVEN, vector, reason)

    def content(self, content_id: str) -> Content | None:
        """A content, None when the table has no such one."""
        return self._content(content_id, self._contents.state)

    def content_titles(self) -> Iterator[pa.RecordBatch]:
        """Id and title in every row of the contents table, also in those that newer ones replaced."""
        return self._contents.batches(["content_id", "title"])

    def _read_content(self, content_id: str, _state: int) -> Content | None:
        rows = self._contents.find(content_id)
        if not rows:
            return None
        frame = latest(pl.concat([content_rows(row) for row in rows]), "content_id")
        (row,) = frame.iter_rows(named=True)
        return Content(*(row[name] for name in ("content_id", "title", "body", "language")))

    def published(self, user_id: str, content_id: str, task: str) -> Published | None:
        """What readers of the published table see for this key."""
        rows = self._published.find(user_id, content_id, task)
        return Published(rows[0].to_pylist()[0]) if rows else None

    # -- refreshing --------------------------------------------------------------------------------------------------

    def _refresh(self, name: str) -> None:
        with self._looking[name]:
            began_s = self._fresh[name].now_s()
            self._refreshes[name]()
            self._fresh[name].looked(began_s)

    def _keep_fresh(self, name: str) -> None:
        num_pauses = 1
        while not self._over.wait(self._pause_s(name, num_pauses)):
            try:
                self._refresh(name)
                num_pauses = 1
            except E2PError as error:  # what is known grows older, and says so
                num_pauses = min(2 * num_pauses, _MAX_PAUSES) if isinstance(error, ConfigError) else 1
                self._log.error("table_not_refreshed", table=name, error_type=type(error).__name__, message=str(error))
            except BaseException as error:  # noqa: BLE001 - half written today, whole in a while; polars' panics are none
                num_pauses = 1
                self._log.error("table_not_refreshed", table=name, error_type=type(error).__name__)

    def _pause_s(self, name: str, num_pauses: int) -> float:
        """So many usual pauses, but not beyond the moment from which the table is too old."""
        tables = self._config.tables
        pause_s, left_s = num_pauses * tables.refresh_s, tables.max_staleness_s - self._fresh[name].age_s
        return min(pause_s, max(left_s, tables.refresh_s)) if left_s > 0 else pause_s

    def _say_what_has_no_room(self) -> None:
        """A table that, written anew, would not fit beside its old copies, while that can still be helped."""
        for name, copies in {"users": self._users, "contents": self._contents}.items():
            if not self.budget.has_room(copies.num_bytes):
                message = f"once {name} are written anew, old and new copies need more than tables.max_bytes. Raise it"
                self._log.error("table_without_room", table=name, num_bytes=copies.num_bytes, message=message)

    def _refresh_users(self) -> None:
        # Too old, they are nobody's consent any more: the new ones may have their room.
        are_of_use = self._fresh["users"].age_s <= self._config.tables.max_staleness_s
        self._users.refresh(self._storage.parquet_files(self._config.inputs.users_uri), may_forget=not are_of_use)

    def _refresh_contents(self) -> None:
        self._contents.refresh(self._storage.parquet_files(self._config.inputs.contents_uri))

    def _refresh_published(self) -> None:
        uri = self._config.output.table_uri
        now = open_table(self._storage, uri)
        if now is not None and now.version() == self.version:
            return  # what else there is to read of a table takes far longer
        table = None if now is None else read_published(self._storage, uri)
        if table is None or table.has_deletion_vectors:
            self._published.refresh([])
            self.version = None
        else:
            # Without a row its text is written again: no row is needed so much that the new ones could not come.
            self._published.refresh(self._infos(table.file_uris), may_forget=True)
            self.version = table.version

    def _infos(self, uris: Sequence[str]) -> list[ObjectInfo]:
        infos = [self._storage.info(uri) for uri in uris]
        found = [info for info in infos if info is not None]
        if len(found) != len(infos):
            raise StorageError(f"{self._config.output.table_uri}: a file of the newest version is gone")
        return found


def _without_refused(users: pa.Table) -> pa.Table:
    """Rows of the users table; of those who opted out the user embedding is not even copied."""
    wanted = pc.fill_null(users["personalize"], False).combine_chunks()
    places = pc.if_else(wanted, pa.array(np.arange(len(users))), pa.scalar(None, pa.int64()))
    at = users.schema.get_field_index("embedding")
    embeddings = users["embedding"].take(places)
    return users.set_column(at, users.schema.field(at).with_nullable(True), embeddings)
