"""Captured passes: what a pass of few tokens launches, kernel by kernel, sent to the GPU as one.

A layer's ten launches take the CPU longer than few tokens take the GPU. Everything that differs between two passes is
in tables at fixed places, so that a pass of another wave is the same graph; passes are padded up to one of some sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from e2p_ray.engine.gpu.attend import GpuRows
from e2p_ray.engine.gpu.tables import (
    PassTables,
    PrefixTable,
    SlotTable,
    TokenTable,
    aligned,
    num_prefix_numbers,
    num_slot_numbers,
    slot_numbers,
)
from e2p_ray.engine.sent import send

if TYPE_CHECKING:
    from e2p_ray.engine.readers import Readers
    from e2p_ray.engine.rows_step import RowsStep
    from e2p_ray.engine.shared_prefix import SuffixSlots

# Beyond, the GPU is busier than whoever launches, and padding would cost more than launching saves.
MAX_TOKENS = 512
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)

MakeRows: TypeAlias = Callable[[TokenTable, PrefixTable, SlotTable, torch.dtype], GpuRows]
Run: TypeAlias = Callable[[Tensor, GpuRows], Tensor]


class Graphs:
    """Passes by their size and tile, captured when they come a second time: the first time warms everything up."""

    def __init__(self, run: Run, make_rows: MakeRows, tables: PassTables) -> None:
        self._run, self._make_rows, self._tables = run, make_rows, tables
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._pool: Any = None  # torch's handle of a pool of memory
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, states: Tensor, step: RowsStep) -> Tensor | None:
        """What the layers make of packed tokens (T, d_model), good until the next pass; None if they are too many."""
        if len(states) > MAX_TOKENS:
            return None
        size = next(size for size in _SIZES if size >= len(states))
        tile = self._tables.tile(step)
        found = self._passes.get((size, tile))
        if found is None:
            found = _Pass(self._tables, states, size, tile)
            found.take(states, step)
            outputs = self._launch(found)
            self._passes[size, tile] = found  # not before: where memory runs out, nothing is warm
            return outputs[: len(states)]
        found.take(states, step)
        if found.graph is None:
            found.num_tries += 1
            if found.num_tries & (found.num_tries - 1) == 0:  # memory that is short may stay so
                self._try_to_capture(found)
        if found.graph is None or found.outputs is None:
            return self._launch(found)[: len(states)]
        found.graph.replay()
        return found.outputs[: len(states)]

    def _launch(self, one: _Pass) -> Tensor:
        rows = self._make_rows(one.tokens, one.prefixes, one.slots, one.states.dtype)
        return self._run(one.states, rows)

    def _try_to_capture(self, one: _Pass) -> None:
        """Capture, unless memory runs out twice.

        Under a capture torch gives nothing back of what it keeps of freed memory, as it does elsewhere: it has to be
        asked before. That is, once nothing holds what a failed capture had made: an exception at hand would.
        """
        for _ in range(2):
            with suppress(torch.OutOfMemoryError):
                self._capture(one)
            if one.graph is not None:
                return
            torch.cuda.empty_cache()

    def _capture(self, one: _Pass) -> None:
        """Not by `torch.cuda.graph`, which collects garbage and empties torch's cache each time.

        All graphs share one pool of memory: one runs at a time, and what it leaves is used up before the next. A pool
        ends with its last graph, and there is no other one under its handle: it is kept from the first capture on that
        goes well.
        """
        device = one.states.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                one.outputs = self._launch(one)
            finally:
                graph.capture_end()
        one.graph, self._pool = graph, pool


class _Pass:
    """Fixed places for the input and the tables of passes of up to `size` tokens."""

    def __init__(self, tables: PassTables, states: Tensor, size: int, tile: int) -> None:
        self._tables, device = tables, states.device
        self._max_tiles = tables.max_tiles(size, tile)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.num_tries = 0  # passes that could have been captured
        self.outputs: Tensor | None = None
        self.states = torch.zeros(size, states.shape[1], dtype=states.dtype, device=device)
        num_numbers = 4 * aligned(size) + 3 * aligned(self._max_tiles)
        self.tokens = TokenTable(
            torch.empty(num_numbers, dtype=torch.int32, device=device), size, self._max_tiles, tile
        )
        num_prefixes = aligned(size)  # a token reads one at most
        self.prefixes = PrefixTable(
            torch.empty(num_prefix_numbers(tables.num_layers, num_prefixes), dtype=torch.int64, device=device),
            num_prefixes,
        )
        self.slots = SlotTable(torch.empty(num_slot_numbers(tables.num_layers), dtype=torch.int64, device=device))
        self._readers: ref[Readers] | None = None
        self._slots: ref[SuffixSlots] | None = None

    def take(self, states: Tensor, step: RowsStep) -> None:
        """The next pass's input and tables; what has not changed since the last one is not sent again."""
        self.states[: len(states)].copy_(states)
        send(self._tables.token_numbers(step, self.tokens.num_tokens, self._max_tiles)[0], self.tokens.numbers)
        if self._readers is None or self._readers() is not step.readers:
            send(self._tables.prefix_numbers(step, self.prefixes.num_prefixes), self.prefixes.numbers)
            self._readers = ref(step.readers)
        if self._slots is None or self._slots() is not step.slots:
            send(slot_numbers(step.slots.keys, step.slots.values), self.slots.numbers)
            self._slots = ref(step.slots)
