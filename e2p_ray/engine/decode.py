"""The token loop: rows of many contents decoded together behind their shared prefixes.

Each content's left part is prefilled once, all rows' own tokens in one batch; then one token a row and step, or as many
as the row's draft gets right. Finished rows leave the batch at once. Where more rows wait than there is room for, new
ones come in when half the wave is free (a wave of 64 that waits for its longest row loses a fifth against one of 256
that is compacted: measured while designing, 8 contents x 64 users). Where all have room, they come in at the next step,
their own tokens in one pass with the others' next ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.admission import Admission, Bounds
from e2p_ray.engine.chosen import Choice
from e2p_ray.engine.contract import EngineStats, Listener
from e2p_ray.engine.drafts import Drafts, RowDraft
from e2p_ray.engine.ending import cut_where_they_end
from e2p_ray.engine.greedy import Likeliest
from e2p_ray.engine.launched import Launched
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.pass_cost import PassCost, measure_pass_cost
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.reach import reach_of_all, reach_of_each
from e2p_ray.engine.row import Row, rows_at_hand
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.sampling import choose, choose_likeliest
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.stopping import Stopping
from e2p_ray.engine.wave import Ended, Wave
from e2p_ray.engine.waves import Waves, looks_later, num_waves
from e2p_ray.schema import Completion, ErrorCode, FinishReason, RequestKey

_Ints = npt.NDArray[np.int64]

# Rows whose logits are made and used up before the next ones, so that they stay in a core's own cache (512 rows of
# 8,192, product and choice: in fp32 45.6 ms at once, 39.2 by 128, 41.9 by 64; in bf16 24.0, 15.0 and 16.6). Twice the
# rows of a task of our own products (GF/s of the product in fp32: 194 at once, 215 by 192, 190 to 202 by 128).
_MAX_CPU_LOGITS = 192
# The CPU's allocator, on Linux and on Windows; CUDA and Triton; cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(slots=True, eq=False)
class _Call:
    """What one call of `run` has in hand."""

    waves: Waves
    drafts: Drafts | None
    pending: deque[Row] = field(default_factory=deque)
    tried_alone: Row | None = None


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
        drafts: Drafts | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        self._base, self._projector, self._stopping = base, projector, stopping
        self.listener: Listener | None = None
        self._drafts = drafts
        self._num_soft = projector.manifest.num_soft_tokens
        self.stats = EngineStats()
        self.store = store or PrefixStore(base, bounds.max_bytes // 2)
        self.given_bounds, self._looks_later = bounds, looks_later(base.device)
        self._admission = Admission(base, self._num_soft, bounds, num_waves(base.device, bounds.max_rows))
        self._call = _Call(Waves(self._admission.num_waves), None)

    def with_bounds(self, bounds: Bounds) -> Decoder:
        """Another decoder over the same model and projector; one of the two may run within the other's pauses."""
        drafts = None if self._drafts is None else self._drafts.of_one_call()
        return Decoder(self._base, self._projector, self._stopping, bounds, drafts)

    @property
    def bounds(self) -> Bounds:
        """How large all waves together may get now: what was given, or less for some time once memory has run out."""
        return self._admission.bounds.times(self._admission.num_waves)

    def run(self, rows: Iterable[Row | Completion | None]) -> Iterator[Completion]:
        """Decode every row; completions are handed on. None: no row waits now, more may come while others are decoded.

        Out of memory halves the wave, down to one row, which then becomes an error. The listener may decode other rows
        between two steps: these have waves of their own, and these ones go on then. So it is with calls that are read
        by turns, or left: none takes another's rows.
        """
        source = iter(rows)
        call = _Call(Waves(self._admission.num_waves), self._drafts_of_call())
        while True:
            with self._within(call):
                found = self._fill(source)
                is_done = not found and not self._has_rows()
            if is_done:
                return
            yield from found
            if self.listener is not None:
                with self._within(call):
                    self.listener.between_steps()
                    found = self._drop(self.listener.cancelled())
                yield from found
            with self._within(call):
                found = self._step()
            yield from found

    def _drafts_of_call(self) -> Drafts | None:
        """Online, where a text is a call of its own, with what earlier ones wrote.

        A batch's shard knows no texts of those before it: guesses change the passes, and with these the last bits of
        log-likelihoods. Only how often guesses held is remembered.
        """
        if self._drafts is None or self.listener is not None:
            return self._drafts
        return self._drafts.of_one_call()

    @contextmanager
    def _within(self, call: _Call) -> Iterator[None]:
        """This call's turn; never while its reader has the floor, who may read another one or close this one then."""
        outer, self._call = self._call, call
        try:
            yield
        finally:
            self._call = outer

    def _step(self) -> list[Completion]:
        """One wave's turn, and what came of it."""
        if not self._has_rows():
            return []
        ended: list[Ended] = []
        given_up: list[Completion] = []
        try:
            self._advance(ended)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            given_up = self._shrink()
        if self.listener is not None:
            self._tell(self.listener)
        return self._counted([*map(self._completion, ended), *given_up])

    def _has_rows(self) -> bool:
        return bool(self._call.pending) or any(True for _ in self._call.waves)

    def _fill(self, source: Iterator[Row | Completion | None]) -> list[Completion]:
        """Keep a wave's worth of rows waiting; completions among them are returned."""
        rows, completions = rows_at_hand(source, self.bounds.max_rows - len(self._call.pending))
        self._call.pending += rows
        return completions

    def _advance(self, ended: list[Ended]) -> None:
        """One wave's turn; rows that are done are added to `ended`, which holds whatever goes wrong afterwards.

        On a GPU the next pass is launched before anybody reads the texts that the last one ended: it runs while they
        are made, checked and written.
        """
        self._call.waves.turn(len(self._call.pending), self._admission.bounds.max_rows)
        if self._looks_later:
            ended += self._retire(self._call.waves.current)
            self._go_on()
        else:
            self._go_on()
            ended += self._retire(self._call.waves.current)

    def _go_on(self) -> None:
        """Rows that wait come in, or those that run get their next tokens."""
        wave, max_rows = self._call.waves.current, self._admission.bounds.max_rows
        num_rows = 0 if wave is None else len(wave)
        # Where more wait than there is room for, in batches: a pass and a prefill for each that leaves would cost more.
        room = self._call.waves.share(len(self._call.pending), max_rows)
        all_fit = num_rows + len(self._call.pending) <= room
        if not (self._call.pending and (all_fit or num_rows <= room // 2) and self._admit(room)):
            assert wave is not None or not self._call.pending, "there are rows, and one alone may always come in"
            if wave is not None:
                self._pass(wave, 0, others_wait=bool(self._call.pending))
        if (wave := self._call.waves.current) is not None:
            self._admission.passed(len(wave))
            self._call.waves.grow(self._admission.num_waves)

    def _shrink(self) -> list[Completion]:
        """Put the wave's rows back and go on with half as many; a row that does not fit twice, alone, is given up.

        The first time, guesses or what was kept of other rows may have been in its way.
        """
        rows = [*(row for wave in self._call.waves for row in wave.rows), *self._call.pending]
        self._call.drafts = None  # guesses make passes larger
        self.store.trim(0)
        self._call.pending = deque(rows)
        halved = self._admission.halve(len(rows))
        self._call.waves = Waves(self._admission.num_waves)
        if halved:
            return []
        if self._call.tried_alone is not rows[0]:
            self._call.tried_alone = rows[0]
            return []
        self._admission.gave_up()
        return [self._error(self._call.pending.popleft(), ErrorCode.OUT_OF_MEMORY)]

    # -- rows come in ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _admit(self, room: int) -> bool:
        """Take as many waiting rows as fit into a wave of `room`, prefill what they need, choose their first tokens."""
        wave = self._call.waves.current
        free = room - (0 if wave is None else len(wave))
        fitting = self._admission.fitting(islice(self._call.pending, free), wave, self.store)
        rows = fitting.rows
        if not rows:
            return False
        if wave is None:
            self._count(num_waves=1)
        wave = self._call.waves.current = self._admission.wave_for(fitting, min(len(self._call.pending), room), wave)
        before = self.store.num_computed_tokens
        prefixes = self.store.get([row.segments.left for row in rows], [row.segments.num_stem for row in rows])
        computed = self.store.num_computed_tokens - before
        self._count(num_computed_tokens=computed, num_prefix_tokens=computed)
        running = len(wave) > 0 and self._admission.run_along(rows, len(wave))
        others_wait = len(self._call.pending) > len(rows)
        for part in self._admission.parts(rows):
            first = 0 if running and part.start == 0 else len(wave)
            self._enter(wave, rows[part], prefixes[part])
            self._pass(wave, first, others_wait=others_wait)
        return True

    def _enter(self, wave: Wave, rows: list[Row], prefixes: list[Prefix | None]) -> None:
        """From those that wait into the wave, without any token in its slots yet."""
        drafts: list[RowDraft | None] = [None] * len(rows)
        if self._call.drafts is not None:
            drafts = self._call.drafts.of(rows, len(wave))
            if wave.guesses.num_unseen:
                self._follow(wave, self._call.drafts)
        stops = [self._stopping.number_of(row.sampling.stop) for row in rows]
        wave.add(rows, drafts, prefixes, [row.num_visible(self._num_soft) for row in rows], stops)
        for _ in rows:
            self._call.pending.popleft()

    # -- one pass ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _pass(self, wave: Wave, first: int, *, others_wait: bool) -> None:
        """Rows from slot `first` on: the last token of those that run, soft tokens and right parts of new ones behind.

        With what their drafts say, in one go; then each row's next token, or as many as its draft got right.
        """
        num_rows = len(wave)
        begun = first + int(np.count_nonzero(wave.num_written[first:num_rows]))  # new rows are behind them
        new = wave.rows[begun:]
        num_own = np.array([*[1] * (begun - first), *(row.num_suffix_tokens(self._num_soft) for row in new)])
        guesses = self._guesses(wave, first, int(num_own.sum()), others_wait=others_wait)
        num_guessed = np.count_nonzero(guesses >= 0, axis=1)
        if first == 0:
            wave.guesses.tried(int(num_guessed.sum()))
        counts = num_own + num_guessed
        step = wave.step(first, counts)
        embeds = self._embeds(wave.last_tokens(first, begun), new, num_own, guesses, step)
        hidden = self._base.hidden(embeds[None], step.position_ids, step)[0]
        wave.num_own[first:num_rows] += num_own - 1  # the last of them counts as what the next token follows
        self._count(
            num_computed_tokens=int(num_own[begun - first :].sum()),
            num_steps=begun > first,
        )
        launched = Launched(np.arange(first, num_rows), guesses, num_guessed)
        self._choose(wave, launched, hidden, step)
        wave.launched.append(launched)

    def _embeds(self, last_tokens: _Ints, new: list[Row], num_own: _Ints, guesses: _Ints, step: RowsStep) -> Tensor:
        """(T, d_model): the last tokens of rows that run; new rows' soft tokens and right parts; all rows' guesses."""
        base, num_begun = self._base, len(last_tokens)
        if len(step.tokens.row) == num_begun:
            return base.embed(sent(last_tokens, base.device))
        num_soft = np.zeros(len(num_own), np.int64)
        num_soft[num_begun:] = [self._num_soft if row.user_embedding is not None else 0 for row in new]
        packed = step.tokens
        ids = np.zeros((len(num_own), int(packed.offset.max()) + 1), np.int64)
        ids[:num_begun, 0] = last_tokens
        for at, row in enumerate(new, num_begun):
            ids[at, num_soft[at] : num_own[at]] = row.right
        rows, columns = np.nonzero(guesses >= 0)
        ids[rows, num_own[rows] + columns] = guesses[rows, columns]
        embeds = base.embed(sent(ids[packed.row, packed.offset], base.device))
        given = [row.user_embedding for row in new if row.user_embedding is not None]
        if given:
            soft = packed.offset < num_soft[packed.row]
            projected = self._projector(sent(np.stack(given), base.device)).to(base.dtype)
            user = np.cumsum(num_soft > 0) - 1  # a row's place among those with a user embedding
            places = sent(np.flatnonzero(soft), base.device)
            chosen = sent(user[packed.row[soft]] * self._num_soft + packed.offset[soft], base.device)
            embeds = embeds.index_copy(0, places, projected.flatten(0, 1)[chosen])
        return embeds

    def _guesses(self, wave: Wave, first: int, num_tokens: int, *, others_wait: bool) -> _Ints:
        """What rows from slot `first` on try in a pass of num_tokens besides: (n, the most tokens + 1), then -1."""
        span, drafts = slice(first, len(wave)), self._call.drafts
        # A row that is done makes place for one that waits, and who follows the engine waits for each text. Else all
        # end with the last one, which may be among rows that are not in this pass.
        each_counts = others_wait or self.listener is not None
        if drafts is None or (first and not each_counts) or not wave.guesses.any_from(first):
            return np.full((len(wave) - first, 1), -1, np.int64)
        outlook = wave.guesses.outlook(first, wave.num_written[span], wave.max_new[span])
        reach_of = reach_of_each if each_counts else reach_of_all
        reach = reach_of(outlook, num_tokens, self._pass_cost(), drafts.experience.agreements)
        return wave.guesses.ahead(first, wave.num_written[span], reach)

    def _choose(self, wave: Wave, launched: Launched, hidden: Tensor, step: RowsStep) -> None:
        """Choose a token behind each row's last and behind each guess, some at a time: logits are wide."""
        guesses, num_guessed = launched.guesses, launched.num_guessed
        rows, columns = np.nonzero(launched.asked)
        places = (step.tokens.end - num_guessed)[rows] + columns
        size = min(self.bounds.max_rows, _MAX_CPU_LOGITS) if hidden.device.type == "cpu" else self.bounds.max_rows
        if (likeliest := self._likeliest(wave, launched.slots, hidden, places, size)) is not None:
            launched.choices.append((rows, columns, choose_likeliest(likeliest)))
            return
        for part in range(0, len(rows), size):
            r, c = rows[part : part + size], columns[part : part + size]
            some = sent(places[part : part + size], hidden.device)
            logits = self._base.logits(hidden[some])
            slots = launched.slots[r]
            written = _continued(wave, slots, guesses[r], guesses.shape[1])
            choice = self._pick(wave, slots, written, wave.num_written[slots] + c, logits)
            launched.choices.append((r, c, choice))

    def _look_at(self, wave: Wave, launched: Launched) -> None:
        """Keep what a pass chose, up to the first wrong guess of each row."""
        chosen, logprobs = launched.chosen()
        slots, guesses = launched.slots, launched.guesses
        # -1 stands for no guess, and for the token of logits that are not finite: that is no guess that came true.
        right = np.cumprod((chosen == guesses) & (guesses >= 0) & launched.asked, axis=1).sum(axis=1)
        wave.write(slots, right + 1, chosen, logprobs)
        wave.num_own[slots] += right + 1
        if self._call.drafts is not None and wave.guesses.passed():
            self._follow(wave, self._call.drafts)
        if num_guessed := int(launched.num_guessed.sum()):
            self._count(num_draft_tokens=num_guessed, num_accepted_tokens=int(right.sum()))

    def _follow(self, wave: Wave, drafts: Drafts) -> None:
        wave.guesses.follow(wave.written, wave.num_written, drafts.told.num_told, drafts.experience)

    def _likeliest(self, wave: Wave, rows: _Ints, hidden: Tensor, places: _Ints, max_rows: int) -> Likeliest | None:
        """The likeliest tokens behind these packed places, where that is all their rows ask for and loops find them."""
        greedy = self._base.greedy
        if greedy is None or not wave.sampling.take(rows).is_greedy:
            return None
        states = hidden if len(places) == len(hidden) else hidden[torch.from_numpy(places)]
        return greedy(states, max_rows) if greedy.takes(states) else None

    def _pick(self, wave: Wave, slots: _Ints, written: _Ints, num_written: _Ints, logits: Tensor) -> Choice:
        """One token behind each of these rows' first num_written (n,) tokens."""
        return choose(logits, wave.sampling.take(slots), written, num_written)

    def _pass_cost(self) -> PassCost:
        """Measured once a base model, when the first draft asks."""
        if self._base.pass_cost is None:
            self._base.pass_cost = measure_pass_cost(self._base)
        return self._base.pass_cost

    # -- rows go out -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _retire(self, wave: Wave | None) -> list[Ended]:
        """Look at what a wave's passes chose, and take the rows that are done out of it."""
        if wave is None or not wave.launched:
            return []
        for launched in wave.launched:
            self._look_at(wave, launched)
        wave.launched.clear()
        reasons = cut_where_they_end(wave, self._stopping)
        if not reasons:
            return []
        ended = [wave.ended(slot, reason) for slot, reason in sorted(reasons.items())]
        self._count(num_output_tokens=sum(len(one.tokens) for one in ended if one.reason is not FinishReason.ERROR))
        self._leave(wave, sorted(reasons))
        return ended

    def _leave(self, wave: Wave, slots: Sequence[int]) -> None:
        """Take these rows out of the wave, which ends with its last one."""
        if slots:
            wave.remove(slots)
        if not len(wave):
            self._admission.ended(wave)
            self._call.waves.end(wave)

    @torch.inference_mode()
    def _drop(self, keys: Set[RequestKey]) -> list[Completion]:
        """Take rows out that nobody waits for."""
        if not keys:
            return []
        # What is on its way is looked at first: it says which rows it belongs to by their slots.
        ended = [one for wave in [*self._call.waves] for one in self._retire(wave)]
        dropped = [row for row in self._call.pending if row.key in keys]
        self._call.pending = deque(row for row in self._call.pending if row.key not in keys)
        for wave in [*self._call.waves]:
            slots = [slot for slot, row in enumerate(wave.rows) if row.key in keys]
            dropped += [wave.rows[slot] for slot in slots]
            self._leave(wave, slots)
        cancelled = [self._error(row, ErrorCode.CANCELLED) for row in dropped]
        return self._counted([*map(self._completion, ended), *cancelled])

    def _tell(self, listener: Listener) -> None:
        """What the streamed rows have written so far."""
        keys = listener.streamed()
        for wave in self._call.waves if keys else ():
            for slot, row in enumerate(wave.rows):
                if row.key in keys:
                    listener.on_text(row.key, self._stopping.text(wave.tokens(slot), row.sampling))

    def _completion(self, ended: Ended) -> Completion:
        row, tokens = ended.row, ended.tokens
        if ended.reason is FinishReason.ERROR:
            return self._error(row, ErrorCode.NON_FINITE_LOGITS)
        if self._call.drafts is not None:
            self._call.drafts.tell(row, tuple(tokens.tolist()))
        return Completion(
            key=row.key,
            text=self._stopping.text(tokens, row.sampling),
            finish_reason=ended.reason,
            num_prompt_tokens=self._num_prompt_tokens(row),
            num_output_tokens=len(tokens),
            mean_logprob=ended.mean_logprob,
            truncated=row.segments.truncated,
        )

    def _error(self, row: Row, code: ErrorCode) -> Completion:
        num_prompt, truncated = self._num_prompt_tokens(row), row.segments.truncated
        return Completion(row.key, "", FinishReason.ERROR, num_prompt, 0, 0.0, code, truncated)

    # -- counting ----------------------------------------------------------------------------------------------------

    def _counted(self, completions: list[Completion]) -> list[Completion]:
        """Requests count as they end: they may come in several times, where memory runs out."""
        if completions:
            self._count(
                num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions),
                num_truncated=sum(completion.truncated for completion in completions),
            )
        return completions

    def _num_prompt_tokens(self, row: Row) -> int:
        return row.segments.num_tokens + (self._num_soft if row.user_embedding is not None else 0)

    def _count(self, **more: int) -> None:
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + number for name, number in more.items()})


def _continued(wave: Wave, slots: _Ints, guesses: _Ints, width: int) -> _Ints:
    """What these rows have written (n, max_new), their guesses (n, width) behind it."""
    written = wave.written[slots]
    for at in range(width - 1):
        place = wave.num_written[slots] + at
        inside = place < written.shape[1]
        written[inside, place[inside]] = guesses[inside, at]
    return written


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: a type of its own, or what a library says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
