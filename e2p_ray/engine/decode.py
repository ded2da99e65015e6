"""The token loop: rows of many contents decoded together behind their shared prefixes.

Each content's left part is prefilled once, all rows' own tokens in one batch; then one token a row and step, or as many
as the row's draft gets right. Finished rows leave the batch at once. Where more rows wait than there is room for, new
ones come in when half the wave is free (a wave of 64 that waits for its longest row loses a fifth against one of 256
that is compacted: measured while designing, 8 contents x 64 users). Where all have room, they come in at the next step,
their own tokens in one pass with the others' next ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.admission import Admission, Bounds
from e2p_ray.engine.contract import EngineStats, Listener
from e2p_ray.engine.drafts import Drafts, RowDraft, TokenIds, chance_needed
from e2p_ray.engine.ending import cut_where_they_end
from e2p_ray.engine.greedy import Likeliest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.overhead import measure_overhead_tokens
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.row import Row, rows_at_hand
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.sampling import Chosen, choose, choose_likeliest
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.stopping import Stopping
from e2p_ray.engine.wave import Wave
from e2p_ray.schema import Completion, ErrorCode, FinishReason, RequestKey

_Ints = npt.NDArray[np.int64]

# Rows whose logits are made and used up before the next ones, so that they stay in a core's own cache (512 rows of
# 8,192, product and choice: in fp32 45.6 ms at once, 39.2 by 128, 41.9 by 64; in bf16 24.0, 15.0 and 16.6). Twice the
# rows of a task of our own products (GF/s of the product in fp32: 194 at once, 215 by 192, 190 to 202 by 128).
_MAX_CPU_LOGITS = 192


class Decoder:
    """Runs rows through the base model in waves. Completions come as they finish, in no order.

    Prefixes stay in the store between calls, so that a second try or the unpersonalised text of a content costs no
    second prefill; they make room for rows when memory is short.
    """

    def __init__(
        self,
        base: BaseModel,
        projector: Projector,
        stopping: Stopping,
        bounds: Bounds,
        new_drafts: Callable[[], Drafts] | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        self._base, self._projector, self._stopping = base, projector, stopping
        self.listener: Listener | None = None
        self._new_drafts = new_drafts
        self._drafts: Drafts | None = None
        self._num_soft = projector.manifest.num_soft_tokens
        self._admission = Admission(base, self._num_soft, bounds)
        self.stats = EngineStats()
        self.store = store or PrefixStore(base, bounds.max_bytes // 2)
        self._pending: deque[Row] = deque()
        self._wave: Wave | None = None
        self._tried_alone: Row | None = None

    def with_bounds(self, bounds: Bounds) -> Decoder:
        """Another decoder over the same model and projector; one of the two may run within the other's pauses."""
        return Decoder(self._base, self._projector, self._stopping, bounds, self._new_drafts)

    @property
    def bounds(self) -> Bounds:
        """How large a wave may get: what was given, or less once memory has run out."""
        return self._admission.bounds

    def run(self, rows: Iterable[Row | Completion | None]) -> Iterator[Completion]:
        """Decode every row; completions are handed on. None: no row waits now, more may come while others are decoded.

        Out of memory halves the wave, down to one row, which then becomes an error. The listener may decode other rows
        between two steps: these have a wave of their own, and this one goes on then.
        """
        source = iter(rows)
        outer = self._pending, self._wave, self._drafts
        self._pending, self._wave = deque(), None
        self._drafts = None if self._new_drafts is None else self._new_drafts()
        try:
            while (refused := self._fill(source)) or self._has_rows():
                yield from refused
                if self.listener is not None:
                    self.listener.between_steps()
                    yield from self._drop(self.listener.cancelled())
                if not self._has_rows():
                    continue
                try:
                    finished = self._advance()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    finished = self._shrink()
                if self.listener is not None:
                    self._tell(self.listener)
                yield from finished
        finally:
            self._pending, self._wave, self._drafts = outer

    def _has_rows(self) -> bool:
        return bool(self._pending) or self._wave is not None

    def _fill(self, source: Iterator[Row | Completion | None]) -> list[Completion]:
        """Keep a wave's worth of rows waiting; completions among them are returned."""
        rows, completions = rows_at_hand(source, self.bounds.max_rows - len(self._pending))
        self._pending += rows
        return completions

    def _advance(self) -> list[Completion]:
        num_rows = 0 if self._wave is None else len(self._wave)
        # Where more wait than there is room for, in batches: a pass and a prefill for each that leaves would cost more.
        all_fit = num_rows + len(self._pending) <= self.bounds.max_rows
        if not (self._pending and (all_fit or num_rows <= self.bounds.max_rows // 2) and self._admit()):
            assert self._wave is not None, "there are rows, and one alone may always come in"
            self._pass(self._wave, 0)
        return self._retire()

    def _shrink(self) -> list[Completion]:
        """Put the wave's rows back and go on with half as many; a row that does not fit twice, alone, is given up.

        The first time, guesses or what was kept of other rows may have been in its way.
        """
        rows = [*(self._wave.rows if self._wave is not None else []), *self._pending]
        self._wave = self._drafts = None  # guesses make passes larger
        self.store.trim(0)
        self._pending = deque(rows)
        if self._admission.halve(len(rows)):
            return []
        if self._tried_alone is not rows[0]:
            self._tried_alone = rows[0]
            return []
        return [self._error(self._pending.popleft(), ErrorCode.OUT_OF_MEMORY)]

    # -- rows come in ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _admit(self) -> bool:
        """Take as many waiting rows as fit, prefill what they need, choose their first tokens."""
        rows = self._admission.fitting(self._pending, self._wave, self.store)
        if not rows:
            return False
        if self._wave is None:
            self.stats = replace(self.stats, num_waves=self.stats.num_waves + 1)
        wave = self._wave = self._admission.wave_for(rows, len(self._pending), self._wave)
        computed = self.store.num_computed_tokens
        prefixes = self.store.get([row.segments.left for row in rows], [row.segments.num_stem for row in rows])
        self._count(prefix=self.store.num_computed_tokens - computed)
        running = len(wave) > 0 and self._admission.run_along(rows, len(wave))
        for part in self._admission.parts(rows):
            first = 0 if running and part.start == 0 else len(wave)
            self._enter(wave, rows[part], prefixes[part])
            self._pass(wave, first)
        return True

    def _enter(self, wave: Wave, rows: list[Row], prefixes: list[Prefix | None]) -> None:
        """From those that wait into the wave, without any token in its slots yet."""
        drafts = [self._drafts.of(row) if self._drafts is not None else None for row in rows]
        stops = [self._stopping.number_of(row.sampling.stop) for row in rows]
        wave.add(rows, drafts, prefixes, [row.num_visible(self._num_soft) for row in rows], stops)
        for _ in rows:
            self._pending.popleft()

    # -- one pass ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _pass(self, wave: Wave, first: int) -> None:
        """Rows from slot `first` on: the last token of those that run, soft tokens and right parts of new ones behind.

        With what their drafts say, in one go; then each row's next token, or as many as its draft got right.
        """
        num_rows = len(wave)
        begun = first + int(np.count_nonzero(wave.num_written[first:num_rows]))  # new rows are behind them
        new = wave.rows[begun:]
        num_own = np.array([*[1] * (begun - first), *(row.num_suffix_tokens(self._num_soft) for row in new)])
        room = (wave.max_new - wave.num_written)[first:num_rows] - 1
        ahead = self._ahead(wave.drafts[first:], room, others_wait=bool(self._pending))
        counts = num_own + [len(tokens) for tokens in ahead]
        step = RowsStep(wave.slots, first, wave.num_own[first:num_rows], counts, wave.readers(first))
        embeds = self._embeds(wave.last_tokens(first, begun), new, num_own, ahead, step)
        hidden = self._base.hidden(embeds[None], step.position_ids, step)[0]
        wave.num_own[first:num_rows] += num_own - 1  # the last of them counts as what the next token follows
        self._count(rows=int(num_own[begun - first :].sum()), prompt=sum(map(self._num_prompt_tokens, new)))
        num_truncated = sum(row.segments.truncated for row in new)
        self.stats = replace(
            self.stats,
            num_truncated=self.stats.num_truncated + num_truncated,
            num_steps=self.stats.num_steps + (begun > first),
        )
        self._write(wave, first, hidden, step, ahead)

    def _embeds(
        self, last_tokens: _Ints, new: list[Row], num_own: _Ints, ahead: Sequence[TokenIds], step: RowsStep
    ) -> Tensor:
        """(T, d_model): the last tokens of rows that run; new rows' soft tokens and right parts; all rows' guesses."""
        base, num_begun = self._base, len(last_tokens)
        num_soft = np.zeros(len(num_own), np.int64)
        num_soft[num_begun:] = [self._num_soft if row.user_embedding is not None else 0 for row in new]
        packed = step.tokens
        ids = np.zeros((len(num_own), int(packed.offset.max()) + 1), np.int64)
        ids[:num_begun, 0] = last_tokens
        for at, row in enumerate(new, num_begun):
            ids[at, num_soft[at] : num_own[at]] = row.right
        for at, tokens in enumerate(ahead):
            if tokens:
                ids[at, num_own[at] : num_own[at] + len(tokens)] = tokens
        embeds = base.embed(torch.from_numpy(ids[packed.row, packed.offset]).to(base.device))
        given = [row.user_embedding for row in new if row.user_embedding is not None]
        if given:
            soft = packed.offset < num_soft[packed.row]
            projected = self._projector(torch.from_numpy(np.stack(given)).to(base.device)).to(base.dtype)
            user = np.cumsum(num_soft > 0) - 1  # a row's place among those with a user embedding
            places = torch.from_numpy(np.flatnonzero(soft)).to(base.device)
            chosen = torch.from_numpy(user[packed.row[soft]] * self._num_soft + packed.offset[soft]).to(base.device)
            embeds = embeds.index_copy(0, places, projected.flatten(0, 1)[chosen])
        return embeds

    def _ahead(self, drafts: Sequence[RowDraft | None], room: _Ints, *, others_wait: bool) -> list[TokenIds]:
        """For each row the tokens to try in the next pass."""
        if self._drafts is None or not any(draft is not None and draft.guess is not None for draft in drafts):
            return [()] * len(drafts)
        share = self._drafts.saved_share(len(drafts), others_wait=others_wait)
        needed = chance_needed(len(drafts), self._overhead_tokens(), share)
        spaces = room.tolist()
        return [() if d is None else d.ahead(needed, space) for d, space in zip(drafts, spaces, strict=True)]

    def _write(self, wave: Wave, first: int, hidden: Tensor, step: RowsStep, ahead: Sequence[TokenIds]) -> None:
        """Choose a token behind each row's last and behind each guess, and keep those before the first wrong guess."""
        rows = np.arange(first, first + len(ahead))
        num_guessed = np.array([len(tokens) for tokens in ahead])
        width = int(num_guessed.max()) + 1
        guesses = np.full((len(rows), width), -1, np.int64)
        for at in np.flatnonzero(num_guessed).tolist():
            guesses[at, : num_guessed[at]] = ahead[at]
        asked = np.arange(width) <= num_guessed[:, None]  # (n, width)
        at = (step.tokens.end - num_guessed)[:, None] + np.arange(width)
        chosen, logprobs = self._choose(wave, rows, hidden, at, asked, guesses)
        right = np.cumprod((chosen == guesses) & asked, axis=1).sum(axis=1)
        wave.write(rows, right + 1, chosen, logprobs)
        wave.num_own[rows] += right + 1
        self._follow(wave, first)
        self.stats = replace(
            self.stats,
            num_draft_tokens=self.stats.num_draft_tokens + int(num_guessed.sum()),
            num_accepted_tokens=self.stats.num_accepted_tokens + int(right.sum()),
        )

    def _follow(self, wave: Wave, first: int) -> None:
        """Show the drafts of rows from slot `first` on what these have written, unless none of all has use for it."""
        if self._drafts is None or wave.num_told_when_idle == self._drafts.num_told:
            return
        are_idle = first == 0
        counts = wave.num_written[first : len(wave)].tolist()
        for draft, written, count in zip(wave.drafts[first:], wave.written[first : len(wave)], counts, strict=True):
            if draft is not None:
                draft.follow(written[len(draft.written) : count].tolist())
                are_idle = are_idle and draft.is_idle
        wave.num_told_when_idle = self._drafts.num_told if are_idle else None

    def _choose(
        self, wave: Wave, rows: _Ints, hidden: Tensor, at: _Ints, asked: npt.NDArray[np.bool_], guesses: _Ints
    ) -> tuple[_Ints, npt.NDArray[np.float32]]:
        """Tokens and log-probabilities (n, width) behind the packed places `at`, where asked; -1 without finite logits.

        Some places at a time: logits are as wide as the vocabulary.
        """
        tokens, logprobs = np.full(at.shape, -1, np.int64), np.zeros(at.shape, np.float32)
        row, column = np.nonzero(asked)

        def put(r: _Ints, c: _Ints, chosen: Chosen) -> None:
            tokens[r, c] = np.where(chosen.finite, chosen.tokens, -1)
            logprobs[r, c] = chosen.logprobs

        size = min(self.bounds.max_rows, _MAX_CPU_LOGITS) if hidden.device.type == "cpu" else self.bounds.max_rows
        if (likeliest := self._likeliest(wave, rows, hidden, at[row, column], size)) is not None:
            put(row, column, choose_likeliest(likeliest))
            return tokens, logprobs
        for part in range(0, len(row), size):
            r, c = row[part : part + size], column[part : part + size]
            places = torch.from_numpy(at[r, c]).to(hidden.device)
            logits = self._base.logits(hidden[places])
            slots = rows[r]
            written = _continued(wave, slots, guesses[r], asked.shape[1])
            chosen = self._pick(wave, slots, written, wave.num_written[slots] + c, logits)
            put(r, c, chosen)
        return tokens, logprobs

    def _likeliest(self, wave: Wave, rows: _Ints, hidden: Tensor, places: _Ints, max_rows: int) -> Likeliest | None:
        """The likeliest tokens behind these packed places, where that is all their rows ask for and loops find them."""
        greedy = self._base.greedy
        if greedy is None or not wave.sampling.take(rows).is_greedy:
            return None
        states = hidden if len(places) == len(hidden) else hidden[torch.from_numpy(places)]
        return greedy(states, max_rows) if greedy.takes(states) else None

    def _pick(self, wave: Wave, slots: _Ints, written: _Ints, num_written: _Ints, logits: Tensor) -> Chosen:
        """One token behind each of these rows' first num_written (n,) tokens."""
        return choose(logits, wave.sampling.take(slots), written, num_written)

    def _overhead_tokens(self) -> float:
        """What a pass costs besides its tokens, in tokens: measured once a base model, when the first draft asks."""
        if self._base.overhead_tokens is None:
            self._base.overhead_tokens = measure_overhead_tokens(self._base)
        return self._base.overhead_tokens

    # -- rows go out -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _retire(self) -> list[Completion]:
        """Take the rows that are done out of the wave."""
        wave = self._wave
        assert wave is not None
        reasons = cut_where_they_end(wave, self._stopping)
        finished = sorted(reasons)
        completions = [self._completion(wave, slot, reasons[slot]) for slot in finished]
        num_output_tokens = sum(completion.num_output_tokens for completion in completions)
        self.stats = replace(self.stats, num_output_tokens=self.stats.num_output_tokens + num_output_tokens)
        self._leave(wave, finished)
        return completions

    def _leave(self, wave: Wave, slots: Sequence[int]) -> None:
        """Take these rows out of the wave, which ends with its last one."""
        if slots:
            wave.remove(slots)
        if not len(wave):
            self._admission.ended(wave)
            self._wave = None

    @torch.inference_mode()
    def _drop(self, keys: Set[RequestKey]) -> list[Completion]:
        """Take rows out that nobody waits for."""
        if not keys:
            return []
        dropped = [row for row in self._pending if row.key in keys]
        self._pending = deque(row for row in self._pending if row.key not in keys)
        if self._wave is not None:
            slots = [slot for slot, row in enumerate(self._wave.rows) if row.key in keys]
            dropped += [self._wave.rows[slot] for slot in slots]
            self._leave(self._wave, slots)
        return [self._error(row, ErrorCode.CANCELLED) for row in dropped]

    def _tell(self, listener: Listener) -> None:
        """What the streamed rows have written so far."""
        wave, keys = self._wave, listener.streamed()
        if wave is None or not keys:
            return
        for slot, row in enumerate(wave.rows):
            if row.key in keys:
                listener.on_text(row.key, self._stopping.text(wave.tokens(slot), row.sampling))

    def _completion(self, wave: Wave, slot: int, reason: FinishReason) -> Completion:
        row, tokens = wave.rows[slot], wave.tokens(slot)
        if reason is FinishReason.ERROR:
            wave.slots.clear(slot)
            return self._error(row, ErrorCode.NON_FINITE_LOGITS)
        if self._drafts is not None:
            self._drafts.tell(row, tuple(tokens.tolist()))
        return Completion(
            key=row.key,
            text=self._stopping.text(tokens, row.sampling),
            finish_reason=reason,
            num_prompt_tokens=self._num_prompt_tokens(row),
            num_output_tokens=len(tokens),
            mean_logprob=float(wave.logprobs[slot, : len(tokens)].mean(dtype=np.float64)),
            truncated=row.segments.truncated,
        )

    def _error(self, row: Row, code: ErrorCode) -> Completion:
        num_prompt, truncated = self._num_prompt_tokens(row), row.segments.truncated
        return Completion(row.key, "", FinishReason.ERROR, num_prompt, 0, 0.0, code, truncated)

    # -- counting ----------------------------------------------------------------------------------------------------

    def _num_prompt_tokens(self, row: Row) -> int:
        return row.segments.num_tokens + (self._num_soft if row.user_embedding is not None else 0)

    def _count(self, *, prefix: int = 0, rows: int = 0, prompt: int = 0) -> None:
        self.stats = replace(
            self.stats,
            num_prompt_tokens=self.stats.num_prompt_tokens + prompt,
            num_computed_tokens=self.stats.num_computed_tokens + prefix + rows,
            num_prefix_tokens=self.stats.num_prefix_tokens + prefix,
        )


def _continued(wave: Wave, slots: _Ints, guesses: _Ints, width: int) -> _Ints:
    """What these rows have written (n, max_new), their guesses (n, width) behind it."""
    written = wave.written[slots]
    for at in range(width - 1):
        place = wave.num_written[slots] + at
        inside = place < written.shape[1]
        written[inside, place[inside]] = guesses[inside, at]
    return written


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: CUDA's own type, or what the CPU allocator says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
