"""The compiled attention and products against plain ones in float64, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from e2p_ray.config import SamplingConfig
from e2p_ray.engine import sampling as sampling_module
from e2p_ray.engine.attention import Shape
from e2p_ray.engine.compiled import LANES, has_loops
from e2p_ray.engine.compiled_attention import SharedReads, can_attend
from e2p_ray.engine.compiled_rows import CompiledRows
from e2p_ray.engine.fused import Norm
from e2p_ray.engine.packed_tokens import PackedTokens
from e2p_ray.engine.panels import Behind, Panels
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.row_sampling import RowSampling
from e2p_ray.engine.sampling import choose
from e2p_ray.engine.shared_prefix import PrefillStep, Prefix, SuffixSlots

TOLERANCE = 5e-6  # sums of up to 700 terms in float32
HALF_TOLERANCE = 0.02  # of weights rounded to 8 bits, where values are about 1
needs_loops = pytest.mark.skipif(not has_loops(), reason="the compiled loops need AVX2")
_Ints = npt.NDArray[np.int64]


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def plain(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (m, H, D) and log-sum-exp (m, H) of queries (m, H, D) over keys (Hkv, t, D), of which `seen` (m, t)."""
    group = queries.shape[1] // keys.shape[0]
    keys, values = (part.double().repeat_interleave(group, dim=0) for part in (keys, values))
    scores = torch.einsum("mhd,htd->mht", queries.double(), keys) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("mht,htd->mhd", scores.softmax(-1), values), scores.logsumexp(-1)


def asked(queries: Tensor, scale: float, keys: Tensor) -> tuple[Tensor, float]:
    """Queries as the loops multiply them with these keys, scaled, and what an output may differ by."""
    from e2p_ray.engine.llvm import has_half_products

    if keys.dtype is torch.float32 or not has_half_products():
        return queries * scale, TOLERANCE
    return (queries * scale).bfloat16(), HALF_TOLERANCE


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


# Around the numbers of lanes, of a block and of a task of queries, and of a tile and of a block of keys.
@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_keys", "num_heads", "num_kv_heads", "dim"),
    [
        ((1, 3, 2), (1, 7, 8), 4, 2, 16),
        ((24, 8, 25), (9, 128, 129), 8, 4, 64),
        ((144, 145), (300, 256), 4, 2, 64),
        ((49, 5), (130, 17), 6, 2, 80),
        ((700,), (33,), 8, 1, 32),
    ],
)
def test_shared_keys(
    num_tokens: Sequence[int],
    num_keys: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    num_threads: int,
) -> None:
    total, longest = sum(num_tokens), max(num_keys) + 3
    queries = random(total, num_heads, dim, seed=1)
    keys, values = (random(len(num_keys), num_kv_heads, longest, dim, seed=at).to(dtype) for at in (2, 3))
    order = np.random.default_rng(0).permutation(total)
    bounds = np.cumsum([0, *num_tokens])
    reads = SharedReads.of(order, bounds, num_keys, list(keys), num_heads // num_kv_heads)
    outputs, tops, sums = (
        torch.zeros(total, num_heads, dim),
        torch.zeros(total, num_heads),
        torch.zeros(total, num_heads),
    )
    reads.attend(queries, list(keys), list(values), outputs, dim**-0.5, lse=(tops, sums))
    for at, length in enumerate(num_keys):
        tokens = order[bounds[at] : bounds[at + 1]]
        scaled, tolerance = asked(queries[tokens], dim**-0.5, keys)
        expected, lse = plain(scaled, keys[at, :, :length], values[at, :, :length], 1.0)
        assert difference(outputs[tokens], expected) < tolerance
        found = tops[tokens] + sums[tokens].log()
        assert difference(found, lse) < TOLERANCE
        other, lse = plain(scaled, keys[at, :, : length + 1], values[at, :, : length + 1], 1.0)
        assert difference(outputs[tokens], other) > 100 * TOLERANCE, "the control must fail: one key more"
        assert difference(found, lse) > 100 * TOLERANCE, "the control must fail: one key more"


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_prefill_sees_what_stands_before(dtype: torch.dtype, num_heads: int, num_threads: int) -> None:
    lengths, longest, dim = [300, 260, 1, 47], 300, 32
    queries = random(4, num_heads, longest, dim, seed=1)
    keys, values = (random(4, 2, longest, dim, seed=at).to(dtype) for at in (2, 3))
    step, shape = PrefillStep(lengths, num_layers=2), Shape(dim**-0.5, None, None)
    assert can_attend(shape, queries, keys)
    output = step.attend(0, queries, keys, values, shape)
    before = torch.ones(longest, longest, dtype=torch.bool).tril()
    for at, length in enumerate(lengths):
        scaled, tolerance = asked(queries[at, :, :length].transpose(0, 1), shape.scale, keys)
        expected, _ = plain(scaled, keys[at, :, :length], values[at, :, :length], 1.0, before[:length, :length])
        assert difference(output[at, :, :length].transpose(0, 1), expected) < tolerance
        if length > 1:
            all_, _ = plain(scaled, keys[at, :, :length], values[at, :, :length], 1.0)
            assert difference(output[at, :, :length].transpose(0, 1), all_) > 10 * tolerance, "the control must fail"


def rows_of(
    lengths: Sequence[int],
    counts: Sequence[int],
    prefixes: Sequence[Prefix | None],
    dim: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    num_later: int = 0,
) -> Tensor:
    """How far the compiled attention of rows with own tokens behind prefixes is from the plain one in float64.

    By tokens; NaN is what the compiled one alone says. dtype: of the own keys; num_later: keys that the plain one sees
    though they are too late.
    """
    num_heads, num_kv_heads, room, first_slot = 4, 2, int(np.max(np.add(lengths, counts))) + 2, 3
    num_slots = len(lengths) + first_slot
    slots = SuffixSlots(1, num_slots, num_kv_heads, room, dim, dtype=dtype, device=torch.device("cpu"))
    slots.keys[0].copy_(random(*slots.keys[0].shape, seed=7))
    slots.values[0].copy_(random(*slots.values[0].shape, seed=8))
    tokens = PackedTokens.of(first_slot, np.array(lengths), np.array(counts))
    readers = Readers.of(prefixes, [0 if prefix is None else prefix.length for prefix in prefixes])
    queries = random(len(tokens.row), num_heads, dim, seed=9)
    found = CompiledRows(slots, tokens, readers, num_heads, num_kv_heads).attend(0, queries, dim**-0.5)
    expected = []
    for token, (row, at) in enumerate(zip(tokens.row, tokens.at, strict=True)):
        end = at + 1 + num_later
        keys, values = (part[0][first_slot + row, :, :end].float() for part in (slots.keys, slots.values))
        prefix = prefixes[row]
        if prefix is not None:
            keys = torch.cat([prefix.keys[0][0].float(), keys], dim=1)
            values = torch.cat([prefix.values[0][0].float(), values], dim=1)
        expected.append(plain(queries[token][None], keys, values, dim**-0.5)[0][0])
    return (found.double() - torch.stack(expected).nan_to_num()).abs().amax(dim=(1, 2))


def prefix_of(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Prefix:
    keys, values = (random(1, 2, length, 64, seed=seed + at).to(dtype) for at in (0, 1))
    return Prefix((keys,), (values,), length)


@needs_loops
@pytest.mark.parametrize("own_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_join_their_prefix_and_their_own_tokens(
    dtype: torch.dtype, own_dtype: torch.dtype, num_threads: int
) -> None:
    one, other = prefix_of(131, 20, dtype), prefix_of(5, 30, dtype)
    prefixes = [one, other, None, one, one, None, other] * 9  # tokens for several tasks
    lengths, counts = [0, 1, 2, 17, 40, 3, 0] * 9, [1, 2, 1, 1, 3, 20, 9] * 9
    _, tolerance = asked(torch.empty(0), 1.0, one.keys[0])
    assert rows_of(lengths, counts, prefixes, dtype=own_dtype).max() < tolerance
    assert rows_of(lengths, counts, prefixes, dtype=own_dtype, num_later=1).min() > tolerance / 10, "the control"


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_with_many_tokens_and_no_prefix(dtype: torch.dtype, num_threads: int) -> None:
    lengths, counts, prefixes = [0, 0, 0], [70, 1, 33], [None] * 3
    _, tolerance = asked(torch.empty(0), 1.0, torch.empty(0, dtype=dtype))
    assert rows_of(lengths, counts, prefixes, dtype=dtype).max() < tolerance
    assert rows_of(lengths, counts, prefixes, dtype=dtype, num_later=1).max() > 10 * tolerance, "the control must fail"


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_keys", [True, False])
def test_a_prefix_that_is_not_a_number_is_not_left_out(dtype: torch.dtype, of_keys: bool) -> None:
    """Its readers would write about no content at all, and nothing would say so."""
    wrong, right = prefix_of(131, 20, dtype), prefix_of(40, 30, dtype)
    (wrong.keys if of_keys else wrong.values)[0][0, :, 77] = torch.nan
    found = rows_of([0, 3, 9, 2], [2, 1, 1, 4], [wrong, right, None, wrong], dtype=dtype)
    assert found.isnan().tolist() == [True, True, False, False, True, True, True, True]


@needs_loops
@pytest.mark.parametrize("num_keys", [1, 7, 8, 129])
def test_values_behind_an_odd_number_of_keys_do_not_count(num_keys: int) -> None:
    queries, keys = random(20, 4, 16, seed=1), random(2, 140, 16, seed=2).bfloat16()
    values = random(2, 140, 16, seed=3).bfloat16()
    found = []
    for behind in (0.0, torch.nan):
        keys[:, num_keys:], values[:, num_keys:] = behind, behind
        outputs = torch.zeros(20, 4, 16)
        reads = SharedReads.of(np.arange(20), np.array([0, 20]), [num_keys], [keys], 2)
        reads.attend(queries, [keys], [values], outputs, 0.25)
        found.append(outputs)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@needs_loops
def test_a_query_that_is_not_a_number_stays_alone() -> None:
    queries, keys, values = random(20, 4, 16, seed=1), random(2, 40, 16, seed=2), random(2, 40, 16, seed=3)
    queries[7, 1] = torch.nan
    reads = SharedReads.of(np.arange(20), np.array([0, 20]), [40], [keys], 2)
    outputs = torch.zeros(20, 4, 16)
    reads.attend(queries, [keys], [values], outputs, 0.25)
    wrong = outputs.isnan()
    assert wrong[7, 1].all()
    assert wrong.sum() == 16


@needs_loops
def test_large_scores_neither_overflow_nor_vanish() -> None:
    queries, keys, values = 300 * random(20, 2, 16, seed=1), random(2, 300, 16, seed=2), random(2, 300, 16, seed=3)
    reads = SharedReads.of(np.arange(20), np.array([0, 20]), [300], [keys], 1)
    outputs = torch.zeros(20, 2, 16)
    reads.attend(queries, [keys], [values], outputs, 1.0)
    expected, _ = plain(queries, keys, values, 1.0)
    assert difference(outputs, expected) < 2e-3  # scores of 3,000, whose last place is 2e-4


@needs_loops
def test_exp_is_exact_to_the_last_places() -> None:
    from numba import njit

    from e2p_ray.engine.vectors import exp, load, store

    def loop(source: int, target: int, count: int) -> None:
        for at in range(0, count, LANES):
            store(exp(load(source + 4 * at)), target + 4 * at)

    given = np.concatenate([np.linspace(-87, 10, 16 * 40_000), [-np.inf, -1e30, -88, np.nan, 0] + [0] * 11])
    given = given.astype(np.float32)
    found = np.zeros_like(given)
    of_all: Any = njit(loop)
    of_all(given.ctypes.data, found.ctypes.data, len(given))
    expected = np.exp(given.astype(np.float64))
    assert (np.abs(found[:-16] - expected[:-16]) / expected[:-16]).max() < 2**-22
    assert found[-16:-11].tolist()[:3] == [0, 0, 0]
    assert np.isnan(found[-13])
    assert found[-12] == 1


def test_what_the_loops_do_not_know_is_left_to_torch() -> None:
    queries, keys = random(1, 4, 3, 16, seed=1), random(1, 2, 3, 16, seed=2)
    assert can_attend(Shape(1.0, None, None), queries, keys) == has_loops()
    assert not can_attend(Shape(1.0, 8, None), queries, keys)
    assert not can_attend(Shape(1.0, None, 50.0), queries, keys)
    assert not can_attend(Shape(1.0, None, None), queries[..., :12], keys[..., :12])
    assert not can_attend(Shape(1.0, None, None), queries, keys.half())
    assert not can_attend(Shape(1.0, None, None), queries.requires_grad_(), keys)


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("behind", list(Behind))
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs"), [(1, 20, 64), (6, 512, 200), (103, 78, 640), (200, 4500, 130)]
)
def test_products_by_panels(
    num_rows: int, num_inputs: int, num_outputs: int, behind: Behind, dtype: torch.dtype, num_threads: int
) -> None:
    states = random(num_rows, 2 * num_inputs, seed=1).to(dtype)[:, :num_inputs]  # rows apart
    weight, up = ((random(num_outputs, num_inputs, seed=seed) / num_inputs**0.5).to(dtype) for seed in (2, 3))
    others, bias = random(num_rows, num_outputs, seed=4).to(dtype), random(num_outputs, seed=5).to(dtype)
    panels, up_panels = Panels.of(weight), Panels.of(up)
    if dtype is torch.bfloat16 and panels is None:
        pytest.skip("with AMX products of bfloat16 are not ours")
    assert panels is not None
    assert up_panels is not None
    gated = behind is Behind.GATED
    found = panels.product(
        states, None if gated else bias, behind, others=others, up=up_panels if gated else None
    ).double()
    plain = states.double() @ weight.double().T + (0 if gated else bias.double())
    silu = torch.nn.functional.silu(plain)
    expected = {
        Behind.NOTHING: plain,
        Behind.SILU: silu,
        Behind.TIMES: plain * others.double(),
        Behind.PLUS: plain + others.double(),
        Behind.GATED: silu * (states.double() @ up.double().T),
    }
    tolerance = 2 * TOLERANCE * (1 + float(expected[behind].abs().max()))
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0

    def is_close(other: Tensor) -> bool:
        return bool(((found - other).abs() <= tolerance + rounding * other.abs()).all())

    assert is_close(expected[behind])
    for other, control in expected.items():
        assert other is behind or not is_close(control), "the control must fail"


@needs_loops
@pytest.mark.parametrize("by_cpu", [True, False])
def test_rounding_to_bfloat16_is_torchs(by_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import njit

    from e2p_ray.engine import llvm
    from e2p_ray.engine.vectors import load, store_bfloat16

    if by_cpu and not llvm.has_half_conversion():
        pytest.skip("needs a CPU that rounds by itself")
    monkeypatch.setattr(llvm, "has_half_conversion", lambda: by_cpu)

    def loop(source: int, target: int, count: int) -> None:
        for at in range(0, count, LANES):
            store_bfloat16(load(source + 4 * at), target + 2 * at)

    ties = (torch.arange(2**15, dtype=torch.int32) * 2**16 + 2**15).view(torch.float32)  # half-way, of every size
    given = torch.cat([random(2**12, seed=1), ties, -ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 4)])
    given = given[(given.abs() >= torch.finfo(torch.float32).tiny) | (given == 0) | given.isnan()]
    given = given[: len(given) // LANES * LANES]
    found = torch.zeros(len(given), dtype=torch.bfloat16)
    of_all: Any = njit(loop)
    of_all(given.data_ptr(), found.data_ptr(), len(given))
    real = ~given.isnan()
    assert torch.equal(found[real].view(torch.int16), given[real].bfloat16().view(torch.int16))
    assert found[~real].isnan().all()
    cut = (given[real].view(torch.int32) >> 16).to(torch.int16)
    assert not torch.equal(found[real].view(torch.int16), cut), "the control must fail"


@needs_loops
def test_silu_of_large_numbers() -> None:
    states = torch.tensor([[-1e4], [-90.0], [0.0], [90.0], [1e4], [torch.nan]])
    panels = Panels.of(torch.ones(64, 1))
    assert panels is not None
    found = panels.product(states, None, Behind.SILU)[:, 0]
    assert found[:5].tolist() == pytest.approx([0, 0, 0, 90, 1e4], rel=0, abs=1e-30)
    assert found[5].isnan()


@needs_loops
@pytest.mark.parametrize(("num_rows", "width"), [(1, 5), (16, 64), (33, 8192), (40, 1003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_and_its_probability(
    dtype: torch.dtype, num_rows: int, width: int, num_threads: int
) -> None:
    logits = (5 * random(num_rows, width, seed=1)).to(dtype)
    logits[0, 0] = -torch.inf
    for row in range(num_rows):  # the largest is anywhere, and once more behind
        logits[row, [row * width // num_rows, -1]] = logits[row].max() + 1
    tokens = np.zeros((num_rows, 1), np.int64)
    sampling = RowSampling.of([(SamplingConfig(), 0)] * num_rows)
    chosen = choose(logits.clone(), sampling, tokens, np.zeros(num_rows, np.int64)).fetched()
    expected = logits.double().log_softmax(-1).amax(-1)
    assert chosen.finite.all()
    assert chosen.tokens.tolist() == logits.float().numpy().argmax(axis=1).tolist()
    assert (chosen.tokens != width - 1).any(), "the control: the last of equals"
    assert difference(torch.from_numpy(chosen.logprobs), expected) < TOLERANCE
    assert difference(torch.from_numpy(chosen.logprobs), 1.001 * expected) > TOLERANCE, "the control must fail"


@needs_loops
@pytest.mark.parametrize("place", [0, 40, 99])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_whose_logits_are_not_finite_is_told_from_others(wrong: float, place: int) -> None:
    logits = random(20, 100, seed=1)
    logits[7, place] = wrong
    logits[9] = -torch.inf
    sampling = RowSampling.of([(SamplingConfig(), 0)] * 20)
    chosen = choose(logits, sampling, np.zeros((20, 1), np.int64), np.zeros(20, np.int64)).fetched()
    assert np.flatnonzero(~chosen.finite).tolist() == [7, 9]


def cuts_of(num_rows: int) -> RowSampling:
    """Every kind of cut in turns, with temperatures from nearly greedy to nearly flat."""
    cuts = [(0, 1.0), (0, 0.9), (5, 1.0), (40, 0.8), (0, 0.05), (100_000, 1.0), (0, 0.9999), (1, 1.0)]
    temperatures = [0.7, 1.0, 0.05, 3.0, 100.0, 1e-300, 1e-6]
    configs = [
        SamplingConfig(top_k=cuts[at % 8][0], top_p=cuts[at % 8][1], temperature=temperatures[at % 7])
        for at in range(num_rows)
    ]
    return RowSampling.of([(config, at) for at, config in enumerate(configs)])


@needs_loops
@pytest.mark.parametrize("width", [1, 7, 16, 1024, 1030, 5000])
def test_tokens_are_drawn_as_by_torch_in_float64(width: int, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, rng = cuts_of(400), np.random.default_rng(3)
    logits = 3 * random(400, width, seed=width)
    logits[::7] = logits[::7].round()  # many equal ones
    logits[::3, width // 2 :] = -torch.inf
    logits[:, 0] = 1.0
    numbers = rng.random(400)
    found = sampling_module._sample(logits, sampling, numbers)
    others = sampling_module._sample(logits, sampling, rng.permutation(numbers))
    monkeypatch.setattr(sampling_module, "has_loops", lambda: False)
    assert torch.equal(found, sampling_module._sample(logits, sampling, numbers))
    assert width == 1 or not torch.equal(found, others), "the control must fail"


@needs_loops
@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
def test_at_the_ends_of_all_numbers_a_token_is_drawn_that_may_be(number: float) -> None:
    sampling = cuts_of(160)
    logits = 3 * random(160, 3000, seed=4)
    logits[:, :10] = logits[:, -10:] = -torch.inf
    found = sampling_module._sample(logits, sampling, np.full(160, number))
    rank = (logits > logits.gather(1, found[:, None])).sum(1).numpy()
    assert logits.gather(1, found[:, None]).isfinite().all()
    assert (rank < np.where(sampling.top_k > 0, sampling.top_k, 3000)).all()
    assert (rank[sampling.top_p == 0.05] < 1500).all()
    assert (rank[sampling.temperature < 0.01] == 0).all()
    cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    if number == 0.0:
        assert (rank[cut] == 0).all()
        assert (found[torch.from_numpy(~cut)] == 10).any(), "the first one that has a weight"


@needs_loops
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_nothing_can_be_drawn_from_disturb_no_other(wrong: float) -> None:
    sampling, numbers = cuts_of(80), np.random.default_rng(5).random(80)
    logits = random(80, 300, seed=6)
    expected = sampling_module._sample(logits, sampling, numbers)
    logits[::10] = wrong
    logits[5, 250] = wrong
    found = sampling_module._sample(logits, sampling, numbers)
    same = torch.ones(80, dtype=torch.bool)
    same[::10] = same[5] = False
    assert torch.equal(found[same], expected[same])
    assert (found[::10] == 0).all()
    assert 0 <= found[5] < 300


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype, num_threads: int) -> None:
    states, weight = random(130, 80, seed=1).to(dtype), random(80, seed=2).to(dtype)
    states[3, 4] = torch.nan
    norm = Norm(SimpleNamespace(weight=weight, variance_epsilon=1e-5))
    found, wide = norm(states), states.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert found.dtype is dtype
    assert found[3].isnan().all()
    rounding = torch.finfo(dtype).eps * expected.abs() * (0.502 if dtype is torch.bfloat16 else 4)
    real = torch.arange(130) != 3
    assert ((found.double() - expected).abs() <= rounding)[real].all()
    assert not ((found.double() - 1.01 * expected).abs() <= rounding)[real].all(), "the control must fail"
