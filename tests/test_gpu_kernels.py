"""The GPU's kernels against plain arithmetic in float64. Without a GPU, Triton's interpreter runs them, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with the extra dev")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("torch finds no GPU, and Triton's interpreter is off", allow_module_level=True)

from e2p_ray.engine.gpu.attend import GpuRows
from e2p_ray.engine.gpu.blocks import TILES, Blocks, blocks_of, tiles_of
from e2p_ray.engine.gpu.likeliest import likeliest_of
from e2p_ray.engine.gpu.row_kernels import turn_heads
from e2p_ray.engine.gpu.tables import PassTables, SlotTable, aligned, slot_numbers
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import Prefix, SuffixSlots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies matrices in float16, which numpy has, but not in bfloat16.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCES = {torch.float32: 1e-5, HALF: 0.03 if HALF is torch.bfloat16 else 0.004}


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """(H, D) of one token's queries (H, D) over keys (Hkv, t, D)."""
    group = queries.shape[0] // keys.shape[0]
    keys, values = (part.double().repeat_interleave(group, dim=0) for part in (keys, values))
    weights = (torch.einsum("hd,htd->ht", queries.double(), keys) * scale).softmax(-1)
    return torch.einsum("ht,htd->hd", weights, values)


class World:
    """Rows with own tokens behind prefixes, some of them behind none."""

    def __init__(
        self, prefix_lengths: Sequence[int], readers: Sequence[int | None], own: Sequence[int], new: Sequence[int],
        *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0,
    ) -> None:  # fmt: skip
        num_rows, max_tokens = len(readers), max(a + b for a, b in zip(own, new, strict=True)) + 3
        longest = max(prefix_lengths, default=1)
        size = (max(len(prefix_lengths), 1), num_kv_heads, longest, head_dim)
        self.keys, self.values = (random(*size, seed=seed + part, dtype=dtype) for part in (1, 2))
        self.prefixes = [
            Prefix((self.keys[at : at + 1, :, :length],), (self.values[at : at + 1, :, :length],), length)
            for at, length in enumerate(prefix_lengths)
        ]
        self.slots = SuffixSlots(1, num_rows + 2, num_kv_heads, max_tokens, head_dim, dtype=dtype, device=DEVICE)
        for part, slots in ((3, self.slots.keys[0]), (4, self.slots.values[0])):
            slots.copy_(random(*slots.shape, seed=seed + part, dtype=dtype))
        read = [None if at is None else self.prefixes[at] for at in readers]
        visible = [0 if prefix is None else prefix.length for prefix in read]
        self.read = read
        self.step = RowsStep(self.slots, 1, np.array(own), np.array(new), Readers.of(read, visible))
        self.queries = random(int(sum(new)), num_heads, head_dim, seed=seed + 5, dtype=dtype)
        self.scale = head_dim**-0.5
        tables = PassTables(1, num_heads // num_kv_heads, DEVICE, TILES)
        self.rows = GpuRows(
            tables.tokens(self.step), tables.prefixes(self.step), tables.slots(self.step),
            num_heads, num_kv_heads, head_dim, dtype,
        )  # fmt: skip

    def wanted(self, *, without_last_own: bool = False) -> Tensor:
        """By plain arithmetic; the control leaves out each token's own key."""
        found = []
        for token, (row, at) in enumerate(zip(self.step.tokens.row, self.step.tokens.at, strict=True)):
            end = at + (not without_last_own)
            parts = [(self.slots.keys[0][row + 1, :, :end], self.slots.values[0][row + 1, :, :end])]
            prefix = self.read[row]
            if prefix is not None:
                parts.insert(0, (prefix.keys[0][0], prefix.values[0][0]))
            keys, values = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
            found.append(plain(self.queries[token], keys, values, self.scale))
        return torch.stack(found)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


SHAPES: dict[str, tuple[Sequence[int], Sequence[int | None], Sequence[int], Sequence[int]]] = {
    "one_content": ([40], [0] * 9, [3] * 9, [1] * 9),
    "several_tiles": ([70, 5], [0] * 21 + [1] * 4, [1] * 25, [1] * 25),
    "uneven": ([64, 130, 1, 17], [1, 0, None, 3, 1, 2, 0, None], [0, 5, 9, 1, 2, 40, 0, 3], [2, 1, 3, 1, 7, 1, 1, 1]),
    "nothing_before": ([], [None] * 3, [1, 2, 3], [2, 1, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["single", "half"])
@pytest.mark.parametrize(
    ("shape", "num_heads", "num_kv_heads", "head_dim"),
    [*((shape, 4, 2, 16) for shape in SHAPES), ("several_tiles", 7, 1, 24), ("uneven", 6, 2, 24), ("uneven", 4, 4, 64)],
)
def test_attention(shape: str, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    world = World(*SHAPES[shape], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    found = world.rows.attend(0, world.queries, world.scale)
    assert difference(found, world.wanted()) < TOLERANCES[dtype]
    if shape != "nothing_before":  # there, a token's own key may be its only one
        assert difference(found, world.wanted(without_last_own=True)) > 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("slot_of_last", [-1, 1])
def test_turned_heads_and_a_token_in_no_slot(slot_of_last: int) -> None:
    """A captured pass is padded with such tokens: what they kept would be before the first slot, another wave's."""
    num_heads, num_kv_heads, head_dim = 4, 2, 16
    heads = random(3, num_heads + 2 * num_kv_heads, head_dim, seed=0)
    slots, places, positions = [1, 0, slot_of_last], [3, 0, 2], [30, 7, 2]
    keys, values = (torch.zeros(4, num_kv_heads, 5, head_dim, device=DEVICE) for _ in range(2))
    table = SlotTable(torch.from_numpy(slot_numbers([keys[2:]], [values[2:]])).to(DEVICE))
    frequencies = 100.0 ** (-torch.arange(head_dim // 2, device=DEVICE) * 2 / head_dim)
    queries = torch.empty(3, num_heads, head_dim, device=DEVICE)
    turn_heads[3, 1](
        heads, queries, *(torch.tensor(ints, dtype=torch.int32, device=DEVICE) for ints in (slots, places, positions)),
        table.addresses[0], table.num_tokens, frequencies, frequencies, frequencies, 1.0, 0.0,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_HEADS=16, BLOCK_HALF=8,
        HAS_NORMS=False,
    )  # fmt: skip

    angles = torch.tensor(positions, device=DEVICE)[:, None, None] * frequencies.double()
    pairs = torch.complex(*heads.double().tensor_split(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.cat([pairs.real, pairs.imag], dim=-1)
    assert difference(queries, turned[:, :num_heads]) < 1e-5
    wanted_keys, wanted_values = torch.zeros_like(keys), torch.zeros_like(values)
    for token in range(2):
        wanted_keys[2 + slots[token], :, places[token]] = turned[token, num_heads : num_heads + num_kv_heads].float()
        wanted_values[2 + slots[token], :, places[token]] = heads[token, num_heads + num_kv_heads :]
    kept_nothing = difference(keys, wanted_keys) < 1e-5 and difference(values, wanted_values) == 0
    assert kept_nothing == (slot_of_last < 0), "control: in a slot it is found there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [7, 4096, 5000])
def test_likeliest(width: int, dtype: torch.dtype) -> None:
    logits = random(6, width, seed=0, dtype=dtype)
    logits[1, 3] = logits[1, 5] = 20.0  # equals: the first one
    logits[2, width - 1] = 30.0
    logits[3, 2], logits[4, 1] = torch.nan, torch.inf
    logits[5] = -torch.inf
    found = likeliest_of(logits)
    tokens, sums = found.tokens.cpu(), found.sums.double().cpu()
    assert tokens[:3].tolist() == [int(logits[0].argmax()), 3, width - 1]
    assert not torch.isfinite(sums[3:]).any()
    wanted = logits[:3].double().logsumexp(-1).cpu()
    assert difference(found.logits[:3].double().cpu() + sums[:3].log(), wanted) < 1e-5


@pytest.mark.parametrize("group", [1, 4, 7])
def test_a_pass_never_has_more_tiles_than_there_is_room_for(group: int) -> None:
    rng = np.random.default_rng(group)
    tables, fullest = PassTables(1, group, DEVICE, TILES), 0.0
    slots = SuffixSlots(1, 600, 1, 4, 4, dtype=torch.float32, device=DEVICE)
    for _ in range(150):
        num_rows, num_prefixes = int(rng.integers(1, 513)), int(2 ** rng.uniform(0, 9.1))
        keys = torch.zeros(1, 1, 3, 4, device=DEVICE)
        prefixes = [Prefix((keys,), (keys,), 3) for _ in range(num_prefixes)]
        read = [prefixes[at] if at < num_prefixes else None for at in rng.integers(0, num_prefixes + 2, num_rows)]
        readers = Readers.of(read, [0 if prefix is None else 3 for prefix in read])
        step = RowsStep(slots, 0, np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64), readers)
        tile, size = tables.tile(step), num_rows + int(rng.integers(0, 60))
        room = tables.max_tiles(size, tile)
        numbers, num_used = tables.token_numbers(step, size, room)  # asserts that they fit
        assert num_used == tables.tokens(step).num_tiles
        fullest = max(fullest, num_used / room)
        counts = numbers[4 * aligned(size) :].reshape(3, -1)[2]
        assert counts[:num_used].sum() == sum(prefix is not None for prefix in read), "every reader is in a tile"
        assert (counts[:num_used] * group <= tile).all()
    assert fullest > 0.9, "control: there is not much more room than that"


H100, A100, L4 = 227 << 10, 163 << 10, 99 << 10


@pytest.mark.parametrize(
    ("max_bytes", "dtype", "dim", "tile", "blocks"),
    [
        (H100, torch.bfloat16, 128, 128, Blocks(64, 3)),
        (A100, torch.bfloat16, 128, 128, Blocks(64, 3)),
        (L4, torch.bfloat16, 128, 128, Blocks(64, 2)),
        (L4, torch.bfloat16, 64, 128, Blocks(64, 3)),
        (H100, torch.bfloat16, 256, 128, Blocks(64, 2)),
        (L4, torch.bfloat16, 256, 128, Blocks(32, 1)),
        (H100, torch.float32, 128, 128, Blocks(64, 1)),
        (L4, torch.float32, 128, 64, Blocks(32, 1)),
        (L4, torch.float32, 128, 128, None),
    ],
)
def test_blocks_fit_into_shared_memory(max_bytes: int, dtype: torch.dtype, dim: int, tile: int, blocks: Any) -> None:
    assert blocks_of(tile, dim, dtype, max_bytes) == blocks
    assert (tile in tiles_of(dim, dtype, max_bytes)) == (blocks is not None)
    assert tiles_of(dim, dtype, max_bytes)[:2] == (16, 32)
