"""Large sets of 128-bit hashes in bounded memory: buckets by leading bits, small ones in memory, large ones on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import SpooledTemporaryFile, gettempdir

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from e2p_ray.errors import StorageError

Hashes = npt.NDArray[np.uint64]  # (n, 2)

_NUM_BUCKETS_LOG2 = 6
_MAX_MEMORY_BYTES = 1 << 20  # of one bucket; what is beyond goes to a temporary file


# Odd, and no sum of some of them is a multiple of a large power of two.
_WEIGHTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)


def hash_rows(*columns: pa.ChunkedArray | pa.Array) -> Hashes:
    """A 128-bit hash of each row over string columns, (n, 2); good within one process. The columns' order counts."""
    # A weighted sum of hashes, not a hash of joined strings: no separator can be forged.
    total = np.zeros((len(columns[0]), 2), dtype=np.uint64)
    for column, weight in zip(columns, _WEIGHTS[: len(columns)], strict=True):
        total += _both_halves(_strings(column)) * weight
    return total


def hash_key(*parts: str) -> Hashes:
    """What `hash_rows` has for one row, (2,), four times as fast (650 us a row of three parts otherwise)."""
    weights = _WEIGHTS[: len(parts), None]
    total: Hashes = (_both_halves(pl.Series(parts, dtype=pl.String)) * weights).sum(axis=0, dtype=np.uint64)
    return total


def _both_halves(strings: pl.Series) -> Hashes:
    return np.stack([strings.hash(seed).to_numpy() for seed in (0, 1000)], axis=1)


def _strings(column: pa.ChunkedArray | pa.Array) -> pl.Series:
    series = pl.from_arrow(column)
    assert isinstance(series, pl.Series), "a column becomes a series"
    return series.cast(pl.String)


def frame_of(hashes: Hashes) -> pl.DataFrame:
    """Hashes as the columns `a` and `b`, to join on."""
    return pl.DataFrame({"a": hashes[:, 0], "b": hashes[:, 1]}, schema={"a": pl.UInt64, "b": pl.UInt64})


def is_among(hashes: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """For each hash whether it is one of the others: (n,)."""
    marked = frame_of(others).unique().with_columns(found=pl.lit(True))
    joined = frame_of(hashes).join(marked, on=["a", "b"], how="left", maintain_order="left")
    found: npt.NDArray[np.bool_] = joined["found"].fill_null(False).to_numpy()
    return found


class HashSpool:
    """A multiset of hashes, each with a number to rank its copies by; use it in a `with`, which removes its files."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        files = [SpooledTemporaryFile(_MAX_MEMORY_BYTES) for _ in range(1 << _NUM_BUCKETS_LOG2)]  # noqa: SIM115
        self._buckets = [self._stack.enter_context(file) for file in files]
        self.num_hashes = 0

    def __enter__(self) -> HashSpool:
        return self

    def __exit__(self, *_: object) -> None:
        with temporary_files():  # what is buffered is written first
            self._stack.close()

    def add(self, hashes: Hashes, ranks: npt.NDArray[np.uint64] | None = None) -> None:
        """Put hashes in, repeated ones too; rank 0 unless given, (n,)."""
        self.num_hashes += len(hashes)
        ranks = np.zeros(len(hashes), dtype=np.uint64) if ranks is None else ranks
        bucket_of = (hashes[:, 0] >> np.uint64(64 - _NUM_BUCKETS_LOG2)).astype(np.int64)
        rows = np.column_stack([hashes, ranks])[np.argsort(bucket_of, kind="stable")]
        ends = np.cumsum(np.bincount(bucket_of, minlength=len(self._buckets)))
        with temporary_files():
            for bucket, part in zip(self._buckets, np.split(rows, ends[:-1]), strict=True):
                bucket.write(part.tobytes())

    def frames(self) -> Iterator[pl.DataFrame]:
        """The distinct hashes, a bucket at a time: `a`, `b`, `count`, `rank` (the highest of the copies)."""
        for bucket in self._buckets:
            with temporary_files():
                bucket.seek(0)
                rows = np.frombuffer(bucket.read(), dtype=np.uint64).reshape(-1, 3)
                bucket.seek(0, 2)
            ranked = frame_of(rows[:, :2]).with_columns(rank=pl.Series(rows[:, 2], dtype=pl.UInt64))
            yield ranked.group_by("a", "b").agg(count=pl.len(), rank=pl.col("rank").max())

    def repeated(self) -> Hashes:
        """Each hash that was put in more than once: (n, 2)."""
        return hashes_of(frame.filter(pl.col("count") > 1) for frame in self.frames())

    def max_count(self) -> int:
        """How often the most frequent hash was put in; 0 when there is none."""
        return max(max(frame["count"], default=0) for frame in self.frames())


@contextmanager
def temporary_files() -> Iterator[None]:
    """A full disk is named, with the variable that says which one it is."""
    try:
        yield
    except OSError as error:
        remedy = "Make room there or set TMPDIR to another place, and run the same command again"
        raise StorageError(f"temporary files in {gettempdir()}: {error.strerror or error}. {remedy}") from error


def hashes_of(frames: Iterator[pl.DataFrame]) -> Hashes:
    """The hashes of frames, joined: (n, 2)."""
    joined = pl.concat(frame.select("a", "b") for frame in frames)
    return np.column_stack([joined["a"].to_numpy(), joined["b"].to_numpy()])
