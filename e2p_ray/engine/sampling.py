"""Choosing tokens: greedy, or sampled by the number that a row's random stream has for the step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.chosen import Choice, Chosen, OnItsWay
from e2p_ray.engine.compiled import DTYPES, has_loops
from e2p_ray.engine.gpu.available import has_kernels
from e2p_ray.engine.greedy import Likeliest
from e2p_ray.engine.row_sampling import RowSampling
from e2p_ray.engine.sent import sent
from e2p_ray.engine.streams import uniforms

# Top-k and top-p look at this many tokens first. Measured on one CPU core, 64 rows of 151,000 tokens in float64: a full
# sort 2.6 s, the largest 1,024 alone 0.18 s.
NUM_LIKELIEST = 1024
# Logits that are sampled from at once: in float64 and several times over they take up to 90 bytes each, 190 MB on a CPU
# and 1.5 GB on a GPU, where a call takes longer to launch (192 rows of 151,936 on a CPU core: 4.1 s at once, 0.8 s by
# 14, which this makes of them).
_MAX_SAMPLED = {"cpu": 1 << 21, "cuda": 1 << 24}


def choose(
    logits: Tensor, sampling: RowSampling, written: npt.NDArray[np.int64], num_written: npt.NDArray[np.int64]
) -> Choice:
    """Choose the next token of every row.

    logits (n, V) float32 or bfloat16, which are used up; written (n, max_new) token ids so far, of which num_written
    (n,) count. A row whose logits hold NaN or +Inf, or nothing above -Inf, is reported as not finite and its token
    means nothing.
    """
    tokens, tops, sums = _likeliest(logits)
    controlled = np.flatnonzero((sampling.repetition_penalty > 1) | (sampling.no_repeat_ngram_tokens > 0))
    adjusted = logits
    if len(controlled):
        adjusted = logits.to(torch.float32, copy=True)
        _control_repetition(adjusted, controlled, sampling, written, num_written)
        tokens = _argmax(adjusted)
    sampled = np.flatnonzero(sampling.temperature > 0)
    if len(sampled):
        size = max(_MAX_SAMPLED[logits.device.type] // logits.shape[1], 1)
        for part in (sampled[at : at + size] for at in range(0, len(sampled), size)):
            numbers = uniforms(sampling.streams[part], num_written[part])
            rows = sent(part, logits.device)
            tokens[rows] = _sample(adjusted[rows].float(), sampling.take(part), numbers)
    # By how much less likely the chosen one is; what is not asked for of 512 rows is 0.4 % of a bf16 run.
    less: Tensor | None = None
    if len(controlled) or len(sampled):
        less = logits.gather(1, tokens[:, None]).squeeze(1).float() - tops
    if sums is None:
        # In place: a log-softmax writes what is read of it at one token only (128 rows of 8,192 with their product and
        # the rest of this, on a CPU: 9.8 for 11.0 ms in fp32, 3.8 for 5.6 in bf16).
        sums = logits.float().sub_(tops[:, None]).exp_().sum(dim=-1)
    return _chosen(tokens, less, sums)


def choose_likeliest(likeliest: Likeliest) -> Choice:
    """What `choose` makes of rows that take their likeliest tokens."""
    return _chosen(likeliest.tokens, None, likeliest.sums)


def _chosen(tokens: Tensor, less: Tensor | None, sums: Tensor) -> Choice:
    return OnItsWay(tokens, less, sums) if tokens.device.type == "cuda" else Chosen.of(tokens, less, sums)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of every row what `Likeliest` has, by the compiled loop or kernel; without one the sums are not there yet."""
    if logits.is_contiguous() and has_kernels(logits.device):
        from e2p_ray.engine.gpu.likeliest import likeliest_of

        found = likeliest_of(logits)
        return found.tokens, found.logits, found.sums
    if logits.device.type != "cpu" or logits.dtype not in DTYPES or not logits.is_contiguous() or not has_loops():
        tokens = _argmax(logits)
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1).float(), None
    from e2p_ray.engine import torch_threads

    found = Likeliest.empty(len(logits))
    torch_threads.run(*found.call(logits))
    return found.tokens, found.logits, found.sums


def _argmax(logits: Tensor) -> Tensor:
    """The likeliest token of every row, the first one of equals.

    By numpy on a CPU: 0.4 ms against 4.1 ms for 256 rows of 8,192, 1.9 against 18 ms for 64 rows of 151,000.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.detach().float().numpy().argmax(axis=1))
    return logits.argmax(dim=-1)


def _control_repetition(
    logits: Tensor,
    rows: npt.NDArray[np.int64],
    sampling: RowSampling,
    written: npt.NDArray[np.int64],
    num_written: npt.NDArray[np.int64],
) -> None:
    """Penalise, in place, the tokens a row has written already, and forbid those that would repeat an n-gram."""
    penalised = rows[(sampling.repetition_penalty[rows] > 1) & (num_written[rows] > 0)]
    if len(penalised):
        count = num_written[penalised, None]
        seen = written[penalised, : int(count.max())]
        # A shorter row repeats its first token: the same value is written twice.
        seen = np.where(np.arange(seen.shape[1]) < count, seen, seen[:, :1])
        places = sent(penalised, logits.device)[:, None], sent(seen, logits.device)
        penalties = sent(sampling.repetition_penalty[penalised, None], logits.device).to(logits.dtype)
        values = logits[places]
        logits[places] = torch.where(values > 0, values / penalties, values * penalties)
    for row in rows[sampling.no_repeat_ngram_tokens[rows] > 0]:
        tokens = written[row, : num_written[row]]
        forbidden = _repeating_tokens(tokens, int(sampling.no_repeat_ngram_tokens[row]))
        if len(forbidden):
            logits[row, sent(forbidden, logits.device)] = -torch.inf


def _repeating_tokens(tokens: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The tokens that would complete an n-gram of this size a second time."""
    if size < 1 or len(tokens) < size:
        return tokens[:0]
    grams = np.lib.stride_tricks.sliding_window_view(tokens, size)
    last = tokens[len(tokens) - size + 1 :]
    return np.unique(grams[(grams[:, :-1] == last).all(axis=1), -1])


def _sample(logits: Tensor, sampling: RowSampling, numbers: npt.NDArray[np.float64]) -> Tensor:
    """Inverse-CDF sampling in float64 after temperature, top-k and top-p.

    Which way a row takes depends on its own settings and logits alone, never on the rows beside it.
    """
    device = logits.device
    if device.type == "cpu" and has_loops():
        return _drawn(logits, sampling, numbers)
    scaled = logits.double() / sent(sampling.temperature, device)[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    draws = sent(numbers, device)[:, None]
    tokens = torch.empty(len(logits), dtype=torch.long, device=device)
    cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    whole = sent(np.flatnonzero(~cut), device)
    if len(whole):
        tokens[whole] = _invert(probabilities[whole], draws[whole])
    rows = sent(np.flatnonzero(cut), device)
    if len(rows):
        top_k = sent(sampling.top_k, device)[rows, None]
        top_p = sent(sampling.top_p, device)[rows, None]
        tokens[rows] = _sample_likeliest(probabilities[rows], draws[rows], top_k, top_p)
    return tokens


def _drawn(logits: Tensor, sampling: RowSampling, numbers: npt.NDArray[np.float64]) -> Tensor:
    """The same by the compiled loop, whose weights are float32."""
    from e2p_ray.engine import torch_threads
    from e2p_ray.engine.draws import DrawCall, draw_tokens

    logits, tokens = logits.contiguous(), torch.empty(len(logits), dtype=torch.long)
    call = DrawCall(
        logits=logits.data_ptr(),
        width=logits.shape[1],
        temperatures=sampling.temperature.ctypes.data,
        top_ps=sampling.top_p.ctypes.data,
        top_ks=sampling.top_k.ctypes.data,
        numbers=numbers.ctypes.data,
        tokens=tokens.data_ptr(),
    )
    torch_threads.run(draw_tokens, len(logits), call)
    return tokens


def _sample_likeliest(probabilities: Tensor, draws: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Sample within top-k and top-p (n, 1); rows for which the NUM_LIKELIEST tokens do not suffice sort all of them."""
    count = min(NUM_LIKELIEST, probabilities.shape[1])
    values, ids = _largest(probabilities, count)
    enough = (((top_k > 0) & (top_k <= count)) | (values.sum(-1, keepdim=True) >= top_p)).squeeze(1)
    tokens = _cut_and_invert(values, ids, draws, top_k, top_p)
    rest = (~enough).nonzero().squeeze(1)
    if len(rest) and count < probabilities.shape[1]:
        values, ids = torch.sort(probabilities[rest], dim=-1, descending=True, stable=True)
        tokens[rest] = _cut_and_invert(values, ids, draws[rest], top_k[rest], top_p[rest])
    return tokens


def _largest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities (n, count) and their ids; ties by id, which topk leaves open."""
    values, ids = torch.topk(probabilities, count, dim=-1)
    ids, by_id = torch.sort(ids, dim=-1)
    values, order = torch.sort(values.gather(1, by_id), dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _cut_and_invert(values: Tensor, ids: Tensor, draws: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Apply top-k, then top-p to what is left, to probabilities in falling order, and sample."""
    rank = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    # Only top-k renormalises before top-p is asked: without it, what is not among `values` still counts.
    total = torch.where(top_k > 0, values.sum(-1, keepdim=True), 1.0)
    before = (values.cumsum(-1) - values) / total
    values = values.masked_fill((before >= top_p) & (rank > 0), 0.0)
    return ids.gather(1, _invert(values, draws)[:, None]).squeeze(1)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """The place (n,) at which the running sum of weights (n, m) passes the drawn share (n, 1) of their total."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    last = (weights > 0).long().mul(torch.arange(weights.shape[1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(1)
