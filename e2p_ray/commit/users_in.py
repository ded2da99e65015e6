"""What of an object belongs to given users, and the object without it: Parquet rows, shard footers, JSON, HTML."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit.shard import FOOTER
from e2p_ray.storage import ObjectInfo, Storage, parquet_bytes

PURGED = b"e2p_ray.purged"  # in the metadata of a Parquet file that rows were taken out of
_CELL = re.compile(r'<td class="id">(.*?)</td>', re.DOTALL)
_LITERAL = re.compile(r"'((?:[^']|'')*)'|\"((?:[^\"]|\"\")*)\"")
_BATCH_ROWS = 1 << 16


class Users:
    """A set of user ids, and which of them were found so far; its repr names none of them."""

    def __init__(self, user_ids: Iterable[str]) -> None:
        self.ids = frozenset(user_ids)
        self.found: set[str] = set()
        self._values = pa.array(sorted(self.ids), pa.string())

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Users({len(self)})"

    def among(self, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """For each row whether it is one of theirs; never null."""
        return pc.is_in(column.cast(pa.string()), value_set=self._values, skip_nulls=True)

    # -- Parquet

    def in_parquet(self, storage: Storage, info: ObjectInfo) -> int:
        """Their rows in a Parquet file, and their dead letters in a shard's footer."""
        with storage.open_parquet(info) as file:
            found = self._num_letters((file.schema_arrow.metadata or {}).get(FOOTER))
            if "user_id" not in file.schema_arrow.names:
                return found
            for batch in file.iter_batches(_BATCH_ROWS, columns=["user_id"], use_threads=False):
                ids = batch["user_id"].cast(pa.string())  # Arrow filters no views
                theirs = ids.filter(self.among(ids))
                self.found.update(theirs.unique().to_pylist())
                found += len(theirs)
        return found

    def _num_letters(self, footer: bytes | None) -> int:
        letters = json.loads(footer)["dead_letters"] if footer is not None else []
        return sum(self._is_one(letter["user_id"]) for letter in letters)

    def out_of_parquet(self, storage: Storage, info: ObjectInfo) -> Rewritten:
        """The file without them; the other rows as they are. The same file gives the same bytes."""
        table = _without_views(storage.read_table(info.uri))
        metadata = dict(table.schema.metadata or {})
        if FOOTER in metadata:
            footer = json.loads(metadata[FOOTER])
            footer["dead_letters"] = [row for row in footer["dead_letters"] if row["user_id"] not in self.ids]
            metadata[FOOTER] = json.dumps(footer, ensure_ascii=False).encode()
        if "user_id" in table.schema.names:
            table = table.filter(pc.invert(self.among(table["user_id"])))
        table = table.replace_schema_metadata(metadata | {PURGED: b"1"})
        return Rewritten(info.uri, table, parquet_bytes(table))

    # -- JSON

    def in_json(self, value: Any) -> int:
        """Objects with one of them as `user_id`, at any depth, also in JSON within a string; and predicates."""
        if isinstance(value, dict):
            found = sum(self.in_json(inner) for inner in value.values())
            found += self._is_one(value.get("user_id"))
            return found + self._in_predicate(value.get("predicate"))
        if isinstance(value, list):
            return sum(self.in_json(inner) for inner in value)
        if isinstance(value, str) and value.startswith("{"):
            return self.in_json(_parsed(value))
        return 0

    def out_of_json(self, value: Any) -> Any:
        """The value without such objects in lists, without such keys elsewhere, without such predicates."""
        if isinstance(value, list):
            kept = [x for x in value if not (isinstance(x, dict) and self._is_one(x.get("user_id")))]
            return [self.out_of_json(inner) for inner in kept]
        if isinstance(value, str) and value.startswith("{") and self.in_json(value):
            return json.dumps(self.out_of_json(_parsed(value)), ensure_ascii=False)
        if not isinstance(value, dict):
            return value
        cleaned = {name: self.out_of_json(inner) for name, inner in value.items()}
        if self._is_one(value.get("user_id")):
            del cleaned["user_id"]
        if self._in_predicate(value.get("predicate")):
            cleaned["predicate"] = "redacted"
        return cleaned

    def _is_one(self, value: Any) -> bool:
        if not (isinstance(value, str) and value in self.ids):
            return False
        self.found.add(value)
        return True

    def _in_predicate(self, value: Any) -> bool:
        """Whether a condition that somebody deleted or changed rows by names one of them."""
        if not isinstance(value, str):
            return False
        quoted = [one.replace("''", "'") or other.replace('""', '"') for one, other in _LITERAL.findall(value)]
        return sum(map(self._is_one, quoted)) > 0  # all are looked at: each is found

    # -- plain text

    def in_text(self, text: str) -> int:
        """How many of them a message names, as they are or as Python writes them; parts of other words count, too.

        They do not count as found by that: a misspelt id may be a part of a word.
        """
        return sum(user_id in text or repr(user_id)[1:-1] in text for user_id in self.ids)

    # -- HTML

    def in_html(self, page: str) -> int:
        """Cells of a report that name one of them."""
        return sum(self._is_one(html.unescape(cell)) for cell in _CELL.findall(page))


@dataclass(frozen=True)
class Rewritten:
    """A Parquet file without some users: what is to take its place."""

    uri: str
    table: pa.Table
    data: bytes


def _without_views(table: pa.Table) -> pa.Table:
    """Other writers' string views as strings: the same Parquet, and pyarrow can filter them."""
    fields = [f.with_type(pa.string()) if pa.types.is_string_view(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
