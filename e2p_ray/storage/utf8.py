"""Strings of Parquet files that are no text: writers that do not look store any bytes as such."""

from __future__ import annotations

import pyarrow as pa

from e2p_ray.errors import InputError


def require_utf8(rows: pa.Table | pa.RecordBatch, uri: str, first_row: int = 0) -> None:
    """InputError where a string holds bytes that are no text: polars panics at some, others break what reads next.

    `first_row` is the place of the first of these rows in the file `uri`.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
    for name in table.column_names:
        row = first_row
        for chunk in table[name].chunks if is_text(table.schema.field(name).type) else []:
            strings = chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk
            try:
                strings.validate(full=True)
            except pa.ArrowInvalid as error:
                remedy = "Write it anew from text that is decoded with the encoding that it really has"
                raise InputError(
                    "not UTF-8", uri=uri, column=name, row=row + _first_broken(strings), remedy=remedy
                ) from error
            row += len(chunk)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, be it by a dictionary."""
    types = pa.types
    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def without_views(table: pa.Table) -> pa.Table:
    """Other writers' string views as strings: the same Parquet, and pyarrow can filter them."""
    fields = [f.with_type(pa.string()) if pa.types.is_string_view(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _first_broken(strings: pa.Array) -> int:
    """The first row whose bytes are no UTF-8."""
    for row, value in enumerate(strings.cast(pa.large_binary()).to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return row
    raise AssertionError("Arrow found a row that Python does not find")
