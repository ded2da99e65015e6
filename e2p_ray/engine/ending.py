"""Which rows of a wave are done, and where their texts end: a pass may have written more than that."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.stopping import Stopping
from e2p_ray.engine.wave import Wave
from e2p_ray.schema import FinishReason

_Ints = npt.NDArray[np.int64]


def cut_where_they_end(wave: Wave, stopping: Stopping) -> dict[int, FinishReason]:
    """The slots of rows that the last pass ended, and why; what it wrote of them beyond that is forgotten."""
    reasons: dict[int, FinishReason] = {}
    num_fresh = wave.num_fresh[: len(wave)].copy()
    before = wave.num_written[: len(wave)] - num_fresh
    for at in range(int(num_fresh.max())):
        slots = np.flatnonzero(at < num_fresh)
        slots = slots[[slot not in reasons for slot in slots.tolist()]] if reasons else slots
        num_tokens = before[slots] + at + 1
        for slot, reason in _ended(wave, stopping, slots, num_tokens):
            reasons[slot] = reason
            wave.cut(slot, int(before[slot]) + at + 1)
    return reasons


def _ended(wave: Wave, stopping: Stopping, slots: _Ints, num_tokens: _Ints) -> list[tuple[int, FinishReason]]:
    """Which of these rows end with their first num_tokens (n,) tokens. Text is looked at only where it could matter."""
    last = wave.written[slots, num_tokens - 1]
    wave.num_chars[slots] += stopping.max_chars_of(last)
    by_text = (wave.num_chars[slots] > wave.max_chars[slots]) | stopping.may_stop(wave.stops[slots], last)
    look = np.flatnonzero(by_text | (last < 0) | stopping.is_end(last) | (num_tokens >= wave.max_new[slots]))
    found = []
    for slot, count, may_by_text in zip(
        slots[look].tolist(), num_tokens[look].tolist(), by_text[look].tolist(), strict=True
    ):
        reason = _reason(wave, stopping, slot, wave.written[slot, :count], may_by_text)
        if reason is not None:
            found.append((slot, reason))
    return found


def _reason(wave: Wave, stopping: Stopping, slot: int, tokens: _Ints, may_by_text: bool) -> FinishReason | None:
    if tokens[-1] < 0:
        return FinishReason.ERROR
    reason = stopping.reason(tokens, wave.rows[slot].sampling) if may_by_text else None
    if reason is None and stopping.is_end(tokens[-1:])[0]:
        reason = FinishReason.END_TOKEN
    if reason is None and len(tokens) >= wave.max_new[slot]:
        reason = FinishReason.MAX_TOKENS
    return reason
