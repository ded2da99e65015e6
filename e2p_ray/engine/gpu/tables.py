"""What the kernels read about a pass: where its tokens, slots and prefixes are. A pass sends it in a copy or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.sent import sent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from e2p_ray.engine.readers import Readers
    from e2p_ray.engine.rows_step import RowsStep
    from e2p_ray.engine.shared_prefix import SuffixSlots

_ALIGNED = 4  # int32 in 16 bytes


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """Of T tokens, in int32: slots, places in them, positions in the text; their order by prefix; tiles of that order.

    A tile is some tokens of one prefix: the prefix's number, where they begin in the order, how many they are.
    """

    numbers: Tensor
    num_tokens: int
    num_tiles: int
    tile: int  # queries of a tile: tokens times heads that share keys

    @property
    def by_token(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slots, places, positions and order, each (T,) or a little more."""
        slots, places, positions, order = self.numbers[: 4 * aligned(self.num_tokens)].view(4, -1).unbind()
        return slots, places, positions, order

    @property
    def by_tile(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefixes, firsts and counts, each (num_tiles,) or a little more."""
        prefixes, firsts, counts = self.numbers[4 * aligned(self.num_tokens) :].view(3, -1).unbind()
        return prefixes, firsts, counts


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTable:
    """Of P prefixes, in int64: lengths, numbers between two of their heads, and addresses (num_layers, P, 2)."""

    numbers: Tensor
    num_prefixes: int

    @property
    def lengths(self) -> Tensor:
        return self.numbers[: self.num_prefixes]

    @property
    def strides(self) -> Tensor:
        return self.numbers[self.num_prefixes : 2 * self.num_prefixes]

    @property
    def addresses(self) -> tuple[Tensor, ...]:
        """Layer by layer (P, 2), of keys and values."""
        return self.numbers[2 * self.num_prefixes :].view(-1, self.num_prefixes, 2).unbind()


@dataclass(frozen=True, slots=True, eq=False)
class SlotTable:
    """Where slots are, in int64: how many tokens each has room for, and addresses of all layers' keys and values."""

    numbers: Tensor

    @property
    def num_tokens(self) -> Tensor:
        return self.numbers[:1]

    @property
    def addresses(self) -> tuple[Tensor, ...]:
        """Layer by layer (2,), of keys and values."""
        return self.numbers[2:].view(-1, 2).unbind()


def aligned(num: int) -> int:
    """So many numbers that those behind them begin at 16 bytes again: kernels are compiled for such addresses."""
    return -(-num // _ALIGNED) * _ALIGNED


def num_prefix_numbers(num_layers: int, num_prefixes: int) -> int:
    """How many a PrefixTable has."""
    return (2 + 2 * num_layers) * num_prefixes


def num_slot_numbers(num_layers: int) -> int:
    """How many a SlotTable has."""
    return 2 + 2 * num_layers


def slot_numbers(keys: Sequence[Tensor], values: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """The numbers of a SlotTable for keys and values (num_rows, Hkv, num_tokens, D), layer by layer."""
    addresses = [(key.data_ptr(), value.data_ptr()) for key, value in zip(keys, values, strict=True)]
    return np.array([keys[0].shape[2], 0, *(address for both in addresses for address in both)], np.int64)


class PassTables:
    """Makes the tables of passes; what has not changed since the last one is not sent again.

    group: heads that share keys; tiles: the numbers of queries that one may have.
    """

    def __init__(self, num_layers: int, group: int, device: torch.device, tiles: tuple[int, ...]) -> None:
        self.num_layers, self._group, self._device, self._tiles = num_layers, group, device, tiles
        # By weak references: what a wave has left is not kept for its addresses.
        self._prefixes: tuple[ref[Readers], PrefixTable] | None = None
        self._slots: tuple[ref[SuffixSlots], SlotTable] | None = None

    def tile(self, step: RowsStep) -> int:
        """Queries of a tile for a pass, by how many its prefixes have in the mean."""
        num_queries = self._group * len(step.tokens.row) / max(len(step.readers.prefixes), 1)
        return next((tile for tile in self._tiles if num_queries <= tile), self._tiles[-1])

    def max_tiles(self, num_tokens: int, tile: int) -> int:
        """The most tiles that a pass of up to so many tokens has: the full ones, and one for each prefix's rest.

        Such a tile is taken where prefixes have more than half of it in the mean; the smallest one wherever that is.
        """
        if tile == self._tiles[0]:
            return num_tokens
        num_full = -(-num_tokens // (tile // self._group))
        num_prefixes = -(-2 * num_tokens * self._group // tile)
        return min(num_full + num_prefixes, num_tokens)

    def tokens(self, step: RowsStep) -> TokenTable:
        """Of a pass, with as many tokens and tiles as it has."""
        num_tokens = len(step.tokens.row)
        numbers, num_tiles = self.token_numbers(step, num_tokens)
        return TokenTable(sent(numbers, self._device), num_tokens, num_tiles, self.tile(step))

    def prefixes(self, step: RowsStep) -> PrefixTable:
        if self._prefixes is None or self._prefixes[0]() is not step.readers:
            num = aligned(max(len(step.readers.prefixes), 1))
            self._prefixes = ref(step.readers), PrefixTable(sent(self.prefix_numbers(step, num), self._device), num)
        return self._prefixes[1]

    def slots(self, step: RowsStep) -> SlotTable:
        if self._slots is None or self._slots[0]() is not step.slots:
            numbers = slot_numbers(step.slots.keys, step.slots.values)
            self._slots = ref(step.slots), SlotTable(sent(numbers, self._device))
        return self._slots[1]

    def token_numbers(
        self, step: RowsStep, num_tokens: int, num_tiles: int | None = None
    ) -> tuple[npt.NDArray[np.int32], int]:
        """Those of a TokenTable with so many of both, and how many tiles the pass has, which is the default.

        Tokens that it does not have are in no slot.
        """
        tokens, each = step.tokens, self.tile(step) // self._group
        assert each, f"{self._group} heads that share keys do not fit into a tile"
        order, bounds = tokens.by_prefix(step.readers)
        num_of_prefix = -(-np.diff(bounds) // each)
        num_real, num_used = len(order), int(num_of_prefix.sum())
        room = num_used if num_tiles is None else num_tiles
        assert num_real <= num_tokens, "the pass fits"
        assert num_used <= room, "its tiles fit"
        end = 4 * aligned(num_tokens)
        found = np.full(end + 3 * aligned(room), -1, np.int32)
        by_token, by_tile = found[:end].reshape(4, -1), found[end:].reshape(3, -1)
        by_token[0, :num_real] = tokens.row + tokens.first_slot
        by_token[1, :num_real] = tokens.at
        by_token[2, :num_real] = step.readers.prefix_lengths[tokens.row] + tokens.at
        by_token[3, :num_real] = order
        prefix = np.repeat(np.arange(len(num_of_prefix)), num_of_prefix)
        before = each * (np.arange(num_used) - np.repeat(np.cumsum(num_of_prefix) - num_of_prefix, num_of_prefix))
        by_tile[0, :num_used] = prefix
        by_tile[1, :num_used] = bounds[prefix] + before
        by_tile[2, :num_used] = np.minimum(np.diff(bounds)[prefix] - before, each)
        return found, num_used

    def prefix_numbers(self, step: RowsStep, num_prefixes: int) -> npt.NDArray[np.int64]:
        """Those of a PrefixTable with room for so many."""
        found = np.zeros(num_prefix_numbers(self.num_layers, num_prefixes), np.int64)
        prefixes = step.readers.prefixes
        found[: len(prefixes)] = step.readers.visible
        found[num_prefixes : num_prefixes + len(prefixes)] = [prefix.keys[0].stride(1) for prefix in prefixes]
        addresses = found[2 * num_prefixes :].reshape(self.num_layers, num_prefixes, 2)
        if prefixes:
            np.stack([prefix.addresses for prefix in prefixes], axis=1, out=addresses[:, : len(prefixes)])
        return found
