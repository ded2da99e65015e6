"""What of an object belongs to given users, and the object without it: Parquet rows, shard footers, JSON, HTML."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit.shard import FOOTER
from e2p_ray.storage import ObjectInfo, Storage, batches, parquet_bytes
from e2p_ray.storage.utf8 import without_views

PURGED = b"e2p_ray.purged"  # in the metadata of a Parquet file that rows were taken out of
_CELL = re.compile(r'<td class="id">(.*?)</td>', re.DOTALL)
_LITERAL = re.compile(r"'((?:[^']|'')*)'|\"((?:[^\"]|\"\")*)\"")
_PREDICATE = re.compile("predicate", re.IGNORECASE)  # mergePredicate, matchedPredicates: names differ by engine
_IN_WORD = r"[^\s()\[\]{},;'\"`=<>!]"


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
            for batch in batches(file, ["user_id"]):
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
        table = without_views(storage.read_table(info.uri))
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
            looks = ((self._in_predicate if _PREDICATE.search(name) else self.in_json, name) for name in value)
            return sum(look(value[name]) for look, name in looks) + self._is_one(value.get("user_id"))
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
        cleans = ((self._out_of_predicate if _PREDICATE.search(name) else self.out_of_json, name) for name in value)
        cleaned = {name: clean(value[name]) for clean, name in cleans}
        if self._is_one(value.get("user_id")):
            del cleaned["user_id"]
        return cleaned

    def in_json_text(self, data: bytes) -> int:
        """The same in one JSON value or one a line; what is no JSON holds nothing: who reads it will say so."""
        text = data.decode("utf-8", "replace")
        whole = _parsed(text)
        return sum(map(self.in_json, map(_parsed, text.split("\n")) if whole is None else [whole]))

    def out_of_json_text(self, data: bytes) -> bytes:
        """The text without them: a line that is one's object goes, one that is no JSON stays."""
        text = data.decode("utf-8", "replace")
        if (whole := _parsed(text)) is not None:
            clean = json.dumps(self.out_of_json(whole), ensure_ascii=False, indent=1)
        else:
            clean = "\n".join(self._out_of_lines(text.split("\n")))
        return clean.encode("utf-8", "replace")

    def _out_of_lines(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if not self.in_json(value := _parsed(line)):
                yield line
            elif kept := self.out_of_json([value]):  # as an object in a list
                yield json.dumps(kept[0], ensure_ascii=False)

    def _is_one(self, value: Any) -> bool:
        if not (isinstance(value, str) and value in self.ids):
            return False
        self.found.add(value)
        return True

    def _in_predicate(self, value: Any) -> int:
        """Conditions that somebody deleted or changed rows by, alone or in JSON, and name one of them."""
        if isinstance(value, list):
            return sum(map(self._in_predicate, value))
        if isinstance(value, str) and (inner := _parsed_list(value)) is not None:
            return self._in_predicate(inner)
        return int(self._is_named(value)) if isinstance(value, str) else self.in_json(value)

    def _out_of_predicate(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._out_of_predicate(inner) for inner in value]
        if not (isinstance(value, str) and self._in_predicate(value)):
            return self.out_of_json(value)
        inner = _parsed_list(value)
        return "redacted" if inner is None else json.dumps(self._out_of_predicate(inner), ensure_ascii=False)

    def _is_named(self, condition: str) -> bool:
        """By a literal or, as Spark notes them, a word without quotes: that may be a number, too, and finds nobody."""
        quoted = [one.replace("''", "'") or other.replace('""', '"') for one, other in _LITERAL.findall(condition)]
        named = sum(map(self._is_one, quoted)) > 0  # all are looked at: each is found
        return named or any(
            re.search(f"(?<!{_IN_WORD}){re.escape(user_id)}(?!{_IN_WORD})", condition)
            for user_id in self.ids
            if user_id in condition
        )

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


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parsed_list(text: str) -> Any:
    """The list that a text is as JSON, else None."""
    parsed = _parsed(text) if text.startswith("[") else None
    return parsed if isinstance(parsed, list) else None
