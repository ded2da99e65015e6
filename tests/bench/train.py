"""Training steps in the content-first layout against plain full sequences: python -m tests.bench.train.

The decode bench's Llama of about 30 M parameters, random weights, fp32, one thread; a step is draw, loss, backward
pass, clipping and AdamW on the projector. Ours is timed twice: every content of a step is new and its prefill counts
(`e2p_ray`), and with prefixes kept from an earlier epoch (`e2p_ray, kept prefixes`). Plain training gives every row its
whole sequence, with gradient back to the soft token, through transformers' own forward (SDPA) and logits for the target
alone, in micro-batches of the size that was its best. It has nothing to share, so it runs a part of the rows.
Seconds are the process's own CPU time: on one thread, what a step takes on a core that nobody else uses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from e2p_ray.engine.lesson import Batch, Lesson
from e2p_ray.engine.manifest import BaseModelFolder, Layout
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.teaching import prefixes_of, row_losses
from e2p_ray.train.fit import Fit, draw
from e2p_ray.train.lessons import LessonTable, Ragged, UserTable
from e2p_ray.train.projector import new_projector
from e2p_ray.train.settings import TrainSettings
from tests.bench.harness import interleaved, print_results
from tests.bench.workloads import llama_30m
from tests.tiny_models import EMBEDDING_DIM, random_model

PLAIN_BATCHES = (4, 8, 16)
PLAIN_MAX_ROWS = 16
STEPS_PER_TURN = 2  # ours are short: so that a turn of each takes about as long
NUM_USERS = 64
MAX_LOSS_DIFFERENCE = 1e-4  # relative, per row; fp32


@dataclass(frozen=True)
class Case:
    """A step of num_contents contents of content_tokens (cue included) with num_users users each."""

    num_users: int
    content_tokens: int
    num_contents: int = 4
    layout: Layout = "content_first"
    target_tokens: int = 16

    @property
    def name(self) -> str:
        suffix = "" if self.layout == "content_first" else f" {self.layout}"
        return f"{self.num_users}x{self.content_tokens}{suffix}"


CASES = (Case(16, 256), Case(4, 256), Case(64, 256, 2), Case(16, 64), Case(16, 256, 1, "soft_first"))


def table_of(case: Case, vocab_size: int, seed: int = 0) -> LessonTable:
    """Random contents and targets, target lengths from half to one and a half of the mean."""
    random = np.random.default_rng(seed)
    num_rows = case.num_contents * case.num_users
    contents = [random.integers(vocab_size, size=case.content_tokens).tolist() for _ in range(case.num_contents)]
    nothing: list[int] = []
    first = case.layout == "content_first"
    half = case.target_tokens // 2
    return LessonTable(
        lefts=Ragged.of(content if first else nothing for content in contents),
        first_row=np.arange(case.num_contents + 1) * case.num_users,
        user=random.integers(NUM_USERS, size=num_rows).astype(np.int32),
        rights=Ragged.of(nothing if first else contents[row // case.num_users] for row in range(num_rows)),
        targets=Ragged.of(
            random.integers(vocab_size, size=random.integers(half, 3 * half + 1)).tolist() for _ in range(num_rows)
        ),
        weight=np.ones(num_rows, np.float32),
        source=np.arange(num_rows),
        user_embeddings=random.standard_normal((NUM_USERS, EMBEDDING_DIM)).astype(np.float32),
    )


def projector_of(base: BaseModel, table: LessonTable, settings: TrainSettings) -> Projector:
    """Random weights: an untrained projector gives all users one soft token, which would hide mistakes."""
    users = UserTable([str(at) for at in range(NUM_USERS)], table.user_embeddings, "space")
    projector = new_projector(base, BaseModelFolder(Path("."), "bench@0", "0"), users, settings)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    return projector


class PlainTraining:
    """The same step over whole sequences: what a training loop without any sharing does."""

    def __init__(self, model: Any, projector: Projector, settings: TrainSettings) -> None:
        self._model, self.projector, self._settings = model.requires_grad_(False), projector, settings
        self._optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.learning_rate)

    def row_losses(self, lessons: Sequence[Lesson], users: Tensor) -> Tensor:
        """Cross-entropy of every row's target, summed (n,); lessons hold one row each."""
        embed = self._model.get_input_embeddings()
        soft = self.projector(users)
        sequences, labels, row = [], [], []
        for at, lesson in enumerate(lessons):
            (item,) = lesson.rows
            right = torch.tensor([*item.right, *item.target[:-1]], dtype=torch.long)
            left = embed(torch.tensor(lesson.left, dtype=torch.long))
            sequences.append(torch.cat([left, soft[at], embed(right)]))
            labels.append(torch.tensor(item.target))
            row += [at] * len(item.target)
        # Right-padded, and causal: a real position never sees the padding, so no mask is needed.
        hidden = self._model.model(inputs_embeds=nn.utils.rnn.pad_sequence(sequences, batch_first=True))[0]
        ends = [len(sequence) for sequence in sequences]
        asked = torch.cat([h[end - len(t) : end] for h, end, t in zip(hidden, ends, labels, strict=True)])
        losses = nn.functional.cross_entropy(self._model.lm_head(asked), torch.cat(labels), reduction="none")
        return losses.new_zeros(len(lessons)).index_add(0, torch.tensor(row), losses)

    def step(self, lessons: Sequence[Lesson], batch: int) -> float:
        """One step over single-row lessons in micro-batches: rows a second."""
        start = time.process_time()
        self._optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(lesson.rows[0].target) for lesson in lessons)
        for at in range(0, len(lessons), batch):
            part = lessons[at : at + batch]
            (self.row_losses(part, users_of(part)).sum() / num_tokens).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.projector.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        return len(lessons) / (time.process_time() - start)


def users_of(lessons: Sequence[Lesson]) -> Tensor:
    """User embeddings (n, d) of the lessons' rows."""
    given = [row.user_embedding for lesson in lessons for row in lesson.rows if row.user_embedding is not None]
    return torch.from_numpy(np.stack(given))


def singles(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Each row as a lesson of its own."""
    return [Lesson(lesson.left, (row,)) for lesson in lessons for row in lesson.rows]


def loss_difference(base: BaseModel, plain: PlainTraining, projector: Projector, lessons: Sequence[Lesson]) -> float:
    """Largest relative difference of a row's loss between the two systems; users who change places must show."""
    few = [Lesson(lesson.left, lesson.rows[:4]) for lesson in lessons[:2]]
    users = users_of(few)
    with torch.no_grad():
        wanted, swapped = plain.row_losses(singles(few), users), plain.row_losses(singles(few), users.flip(0))
        prefixes = prefixes_of(PrefixStore(base, 1 << 30), base, [lesson.left for lesson in few])
        found = row_losses(base, projector(users), prefixes, Batch.of(few, 1, base.device))
    difference = float(((found - wanted).abs() / wanted).max())
    assert difference < MAX_LOSS_DIFFERENCE, f"the two systems disagree by {difference:.1e}"
    assert float(((swapped - wanted).abs() / wanted).max()) > MAX_LOSS_DIFFERENCE, "the control must differ"
    return difference


def best_batch(plain: PlainTraining, rows: Sequence[Lesson]) -> int:
    """The micro-batch size at which plain training is fastest here; each is tried twice, in turns."""
    sizes = [size for size in PLAIN_BATCHES if size <= len(rows)]
    rates = interleaved("plain in batches", {str(size): partial(plain.step, rows[:size], size) for size in sizes}, 2)
    return int(max(rates, key=rates.__getitem__))


def stepper(fit: Fit, num_rows: int) -> Callable[[], float]:
    """Rows a second of the next few steps; the first one, which fills the store, is not timed."""
    steps = fit.run()
    next(steps)

    def step() -> float:
        start = time.process_time()
        for _ in range(STEPS_PER_TURN):
            next(steps)
        return STEPS_PER_TURN * num_rows / (time.process_time() - start)

    return step


def measure(case: Case, *, num_repeats: int, plain_rows: int) -> list[dict[str, Any]]:
    config = llama_30m()
    base, model = BaseModel(random_model(config)), random_model(config, attention="sdpa")
    table = table_of(case, config.vocab_size)
    settings = TrainSettings(
        num_steps=10_000,
        contents_per_step=case.num_contents,
        users_per_content=case.num_users,
        learning_rate=1e-5,
        layout=case.layout,
    )
    plain = PlainTraining(model, projector_of(base, table, settings), settings)
    lessons = draw(table, settings, 0, 0, 1)
    difference = loss_difference(base, plain, plain.projector, lessons)
    # Shortest target first: plain training pads least so.
    rows = sorted(singles(lessons)[:plain_rows], key=lambda lesson: len(lesson.rows[0].target))
    best = best_batch(plain, rows)
    # A store without room keeps nothing: every step computes its prefixes, as if all contents were new.
    room = {"e2p_ray": 0} | ({"e2p_ray, kept prefixes": 1 << 30} if case.layout == "content_first" else {})
    runs = {f"plain (batch {best})": lambda: plain.step(rows, best)}
    for name, max_bytes in room.items():
        with_room = replace(settings, max_prefix_bytes=max_bytes)
        fit = Fit(base, projector_of(base, table, settings), table, with_room)
        runs[name] = stepper(fit, table.num_rows)
    (baseline, rate), *ours = interleaved(case.name, runs, num_repeats).items()
    results = [{"case": case.name, "system": baseline, "rows_per_s": rate, "ratio": 1.0}]
    for name, our_rate in ours:
        result = {"case": case.name, "system": name, "rows_per_s": our_rate, "ratio": our_rate / rate}
        results.append(result | {"loss_difference": f"{difference:.0e}"})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="one case by name, for example 16x256")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer plain rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for case in CASES:
        if options.only in (None, case.name):
            num_repeats, plain_rows = (1, 8) if options.quick else (options.repeats, PLAIN_MAX_ROWS)
            results += measure(case, num_repeats=num_repeats, plain_rows=plain_rows)
    print_results("train", results, num_threads=options.threads)


if __name__ == "__main__":
    main()
