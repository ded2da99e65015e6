"""The training loop: every step a function of the seed and its number, so that a resumed training goes on as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from e2p_ray.engine.lesson import Batch, Lesson
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.teaching import prefixes_of
from e2p_ray.errors import RunError
from e2p_ray.train.lessons import LessonTable
from e2p_ray.train.loss import target_loss
from e2p_ray.train.records import StepRecord
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings


class World(Protocol):
    """The workers that train one projector together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over the workers."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every worker's value."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """A world of one worker."""

    rank: int = 0
    size: int = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def sum(self, value: Tensor) -> Tensor:
        return value


class Fit:
    """Trains a projector step by step; `state` and `load_state` carry it over a kill."""

    def __init__(
        self,
        base: BaseModel,
        projector: Projector,
        lessons: LessonTable,
        settings: TrainSettings,
        *,
        validation: LessonTable | None = None,
        world: World | None = None,
    ) -> None:
        self._base, self._lessons, self._settings, self._validation = base, lessons, settings, validation
        self.projector = projector
        self._world = world or Alone()
        self._wrapped = self._world.wrap(projector)
        self._store = PrefixStore(base, settings.max_prefix_bytes)
        named = dict(projector.named_parameters())
        groups = [
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate)
        self.num_steps_done = 0
        self.records: list[StepRecord] = []
        self._best: dict[str, Tensor] | None = None
        self.best_loss = math.inf
        self._num_worse = 0

    @property
    def finished(self) -> bool:
        """All steps are done, or validation has not improved for too long."""
        patience = self._settings.patience
        return self.num_steps_done >= self._settings.num_steps or (patience is not None and self._num_worse >= patience)

    def run(self) -> Iterator[StepRecord]:
        """Train until finished, one record a step."""
        while not self.finished:
            yield self._step()

    def _step(self) -> StepRecord:
        step, settings = self.num_steps_done, self._settings
        rate = settings.learning_rate * schedule(step, settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_seed_of(settings.seed, step, self._world.rank))  # dropout
        self.projector.train()
        lessons = draw(self._lessons, settings, step, self._world.rank, self._world.size)
        loss_sum, weight, num_tokens = self._losses(lessons)
        total_weight, total_tokens = self._world.sum(torch.stack([weight.detach(), num_tokens])).unbind()
        self._optimizer.zero_grad(set_to_none=True)
        # The workers' gradients are averaged, hence the factor: the result is the mean over all their tokens.
        (loss_sum * self._world.size / total_weight).backward()  # type: ignore[no-untyped-call]
        loss = float(self._world.sum(loss_sum.detach().clone()) / total_weight)
        norm = float(nn.utils.clip_grad_norm_(self.projector.parameters(), settings.clip_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"the loss became {loss} and its gradient {norm} at step {step}. Lower training.learning_rate, or look "
                "for user embeddings that are far larger than the others"
            )
        self._optimizer.step()
        self.num_steps_done += 1
        record = StepRecord(self.num_steps_done, loss, rate, norm, int(total_tokens), self._validate_if_due())
        self.records.append(record)
        return record

    def _losses(self, lessons: list[Lesson]) -> tuple[Tensor, Tensor, Tensor]:
        """What `target_loss` gives, and the number of target tokens."""
        manifest = self.projector.manifest
        if not lessons:  # fewer contents than workers: nothing to add, but the gradients must meet
            users = torch.zeros(1, manifest.embedding_dim, device=self._base.device)
            zero = torch.zeros((), device=self._base.device)
            return self._wrapped(users).sum() * 0.0, zero, zero
        batch = Batch.of(lessons, manifest.num_soft_tokens, self._base.device)
        prefixes = prefixes_of(self._store, self._base, [lesson.left for lesson in lessons])
        return *target_loss(self._base, self._wrapped, prefixes, batch), batch.num_tokens.sum().float()

    def _validate_if_due(self) -> float | None:
        done, settings = self.num_steps_done, self._settings
        if self._validation is None or (done % settings.validate_every and done < settings.num_steps):
            return None
        self.projector.eval()
        loss = self.scored(self.projector, self._validation).mean_nll
        if loss < self.best_loss:
            self.best_loss, self._num_worse = loss, 0
            self._best = {name: value.detach().clone() for name, value in self.projector.state_dict().items()}
        else:
            self._num_worse += 1
        return loss

    def scored(self, projector: Projector | None, table: LessonTable) -> RowScores:
        """The scores of a table, each worker taking a share of its lessons; every worker gets them all."""
        own = score(self._base, projector, table, self._store, rank=self._world.rank, size=self._world.size)
        # In float32, as they were computed: all but one worker add zeros, so that nothing is rounded.
        summed = self._world.sum(torch.from_numpy(own.nll.astype(np.float32)).to(self._base.device))
        return RowScores(summed.double().cpu().numpy(), own.num_tokens)

    def finish(self) -> Projector:
        """The projector with the best validation loss, or as it is; frozen."""
        if self._best is not None:
            self.projector.load_state_dict(self._best)
        return self.projector.eval().requires_grad_(False)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors, and plain values that JSON can hold."""
        tensors = {f"projector.{name}": value for name, value in self.projector.state_dict().items()}
        names = {id(p): name for name, p in self.projector.named_parameters()}
        for parameter, moments in self._optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
        tensors |= {f"best.{name}": value for name, value in (self._best or {}).items()}
        values = {
            "num_steps_done": self.num_steps_done,
            "best_loss": self.best_loss if self._best is not None else None,
            "num_worse": self._num_worse,
            "records": [[getattr(r, name) for name in StepRecord.__slots__] for r in self.records],
        }
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a `state` of a training with the same settings."""
        self.projector.load_state_dict(_under(tensors, "projector."))
        for name, parameter in self.projector.named_parameters():
            moments = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    moments[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
            if moments:
                self._optimizer.state[parameter] = moments
        self._best = _under(tensors, "best.") or None
        self.best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
        self.num_steps_done, self._num_worse = values["num_steps_done"], values["num_worse"]
        self.records = [StepRecord(*record) for record in values["records"]]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the learning rate: warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))


def _seed_of(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def draw(table: LessonTable, settings: TrainSettings, step: int, rank: int, size: int) -> list[Lesson]:
    """One worker's lessons of one step: all contents in a random order, again and again, some of each one's rows.

    The workers share one order, so that two of them draw what one with twice the contents would.
    """
    per_step = min(settings.contents_per_step * size, len(table))
    orders: dict[int, Any] = {}
    chosen = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, at = divmod(place, len(table))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([settings.seed, 1, epoch]).permutation(len(table))
        chosen.append((place, int(orders[epoch][at])))
    lessons = []
    for place, lesson in chosen[rank::size]:
        rows = np.array(table.rows_of(lesson))
        random = np.random.default_rng([settings.seed, 2, place])
        count = min(settings.users_per_content, len(rows))
        lessons.append(table.lesson(lesson, random.choice(rows, size=count, replace=False).tolist()))
    return lessons
