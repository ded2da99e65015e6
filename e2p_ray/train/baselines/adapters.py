"""LoRA and prefix tuning: what one would train instead of a projector. Baselines for evaluation; nothing serves them.

They know no user, so a content is still run once for all rows of a step; but its keys and values depend on what is
being learned: they are computed anew in every step, with gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from e2p_ray.engine.lesson import Batch, Lesson, LessonRow
from e2p_ray.engine.model import BaseModel, pick_device
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.teaching import prefixes_of, row_losses
from e2p_ray.errors import ConfigError, RunError
from e2p_ray.train.baselines.live_prefixes import LivePrefixes
from e2p_ray.train.fit import draw, schedule
from e2p_ray.train.lessons import LessonTable
from e2p_ray.train.records import StepRecord
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings

AdapterKind = Literal["prefix_tuning", "lora"]

# Beyond these a baseline is no longer what its name says: a prefix eats the window, a rank is no longer low.
MAX_VIRTUAL_TOKENS = 64
MAX_RANK = 64
# Of the prefixes in one pass of scoring, of which none is kept: as many as a projector's may keep by default.
_MAX_SCORED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A copy of the base model with something in it to be learned, for all users alike.

    `size` is a LoRA's rank, or the number of a prefix's virtual tokens.
    """

    kind: AdapterKind
    size: int
    base: BaseModel
    parameters: tuple[nn.Parameter, ...]
    prefixes: LivePrefixes
    records: tuple[StepRecord, ...] = ()

    @property
    def num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that every row has on top of its prompt."""
        return self.size if self.kind == "prefix_tuning" else 0

    def score(self, table: LessonTable) -> RowScores:
        """Score every target of a table; there is no soft token. ConfigError when the window is too small."""
        self.refuse_too_long(table)
        return score(self.base, None, table, self.prefixes, max_bytes=_MAX_SCORED_BYTES)

    def refuse_too_long(self, table: LessonTable) -> None:
        """ConfigError when virtual tokens, prompt and target do not fit the base model's window together."""
        contents = np.repeat(np.diff(table.lefts.starts), np.diff(table.first_row))
        longest = int((contents + np.diff(table.rights.starts) + np.diff(table.targets.starts)).max()) - 1
        if longest + self.num_virtual_tokens > self.base.max_positions:
            raise ConfigError(
                f"{self.kind}: rows of {longest} tokens and {self.num_virtual_tokens} virtual tokens do not fit the "
                f"base model's window of {self.base.max_positions}. Lower tasks.*.max_content_tokens, or leave this "
                "method out"
            )


def train_adapter(
    folder: Path,
    kind: AdapterKind,
    lessons: LessonTable,
    settings: TrainSettings,
    *,
    num_parameters: int,
    validation: LessonTable | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    on_progress: Callable[[int, float], None] | None = None,
) -> Adapter:
    """Train an adapter of about `num_parameters` on a fresh copy of the base model in `folder`.

    Steps, draws, loss, optimiser, schedule and the choice of the best by validation are those of `Fit` for one worker;
    user embeddings are not read. Raises ConfigError for LoRA without peft, RunError when the loss is not finite.
    """
    base = BaseModel.load(folder, dtype, pick_device(device))
    adapter = new_adapter(base, kind, lessons, num_parameters, settings.seed)
    return fit_adapter(adapter, lessons, settings, validation=validation, on_progress=on_progress)


def new_adapter(base: BaseModel, kind: AdapterKind, lessons: LessonTable, num_parameters: int, seed: int) -> Adapter:
    """An untrained adapter of about `num_parameters`; LoRA changes this base model in place.

    LoRA starts as no change at all; a prefix starts as the keys and values of the lessons' first tokens, since random
    ones do harm that a short training does not undo (Li and Liang, arXiv 2101.00190, section 7.4).
    """
    torch.manual_seed(seed)
    if kind == "lora":
        size, parameters = _insert_lora(base.model, num_parameters)
        return Adapter(kind, size, base, parameters, LivePrefixes(base, lambda: _no_prefix(base)))
    first = _first_keys_and_values(base, lessons)
    size = _size(num_parameters, first[..., 0, :].numel(), MAX_VIRTUAL_TOKENS)
    learned = nn.Parameter(first[..., :size, :].float().clone())

    def prefix() -> Prefix:
        keys, values = learned.to(base.dtype)[:, :, None]
        return Prefix(tuple(keys), tuple(values), size)

    return Adapter(kind, size, base, (learned,), LivePrefixes(base, prefix))


def _size(num_parameters: int, each: int, most: int) -> int:
    return min(max(1, round(num_parameters / each)), most)


def _no_prefix(base: BaseModel) -> Prefix:
    (nothing,) = prefixes_of(PrefixStore(base, 0), base, [()])
    return nothing


def _insert_lora(model: PreTrainedModel, num_parameters: int) -> tuple[int, tuple[nn.Parameter, ...]]:
    """Two low-rank matrices beside every linear layer but the vocabulary's (QLoRA, arXiv 2305.14314); their rank."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft. Install the extra: pip install 'e2p_ray[evaluate]'") from error
    layers = [module for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)]
    size = _size(num_parameters, sum(sum(layer.weight.shape) for layer in layers), MAX_RANK)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=size,
        lora_alpha=2 * size,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )
    wrapped = peft.get_peft_model(model, config)
    return size, tuple(parameter for parameter in wrapped.parameters() if parameter.requires_grad)


@torch.no_grad()
def _first_keys_and_values(base: BaseModel, lessons: LessonTable) -> Tensor:
    """Keys and values of the lessons' first tokens in every layer: (2, num_layers, Hkv, MAX_VIRTUAL_TOKENS, D)."""
    ids = np.resize(np.concatenate([lessons.lefts.ids, lessons.rights.ids]), MAX_VIRTUAL_TOKENS)
    store = LivePrefixes(base, lambda: _no_prefix(base))
    (prefix,) = store.get([tuple(ids.tolist())])
    assert prefix is not None
    return torch.stack([torch.cat(prefix.keys), torch.cat(prefix.values)])


def fit_adapter(
    adapter: Adapter,
    lessons: LessonTable,
    settings: TrainSettings,
    *,
    validation: LessonTable | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> Adapter:
    """Train an adapter in place; the one that comes back has its records, and its best parameters."""
    adapter.refuse_too_long(lessons)
    # All of them are matrices: the settings' weight decay is for each.
    optimizer = torch.optim.AdamW(adapter.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best = _Best(adapter, settings)
    records: list[StepRecord] = []
    for step in range(settings.num_steps):
        rate = settings.learning_rate * schedule(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        mean, num_tokens = adapter_loss(adapter, draw(lessons, settings, step, 0, 1))
        mean.backward()  # type: ignore[no-untyped-call]
        loss = float(mean.detach())
        norm = float(nn.utils.clip_grad_norm_(adapter.parameters, settings.clip_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"{adapter.kind}: the loss became {loss} and its gradient {norm} at step {step}. Lower "
                "training.learning_rate"
            )
        optimizer.step()
        due = (step + 1) % settings.validate_every == 0 or step + 1 == settings.num_steps
        found = best.look(validation) if validation is not None and due else None
        records.append(StepRecord(step + 1, loss, rate, norm, num_tokens, found))
        if on_progress is not None:
            on_progress(step + 1, loss)
        if best.enough:
            break
    best.restore()
    return replace(adapter, records=tuple(records))


def adapter_loss(adapter: Adapter, lessons: Sequence[Lesson]) -> tuple[Tensor, int]:
    """Weighted mean cross-entropy of the lessons' targets (nats per token), differentiable, and how many these are."""
    plain = [_without_soft_token(lesson) for lesson in lessons]
    batch = Batch.of(plain, 0, adapter.base.device)
    prefixes = prefixes_of(adapter.prefixes, adapter.base, [lesson.left for lesson in plain])
    losses = row_losses(adapter.base, None, prefixes, batch)
    weight = (batch.num_tokens * batch.weights).sum()
    return (losses * batch.weights).sum() / weight, int(batch.num_tokens.sum())


def _without_soft_token(lesson: Lesson) -> Lesson:
    """Rows must begin with a token of their own: the content's last one."""
    rows = (LessonRow(None, [*lesson.left[-1:], *row.right], row.target, row.weight) for row in lesson.rows)
    return Lesson(lesson.left[:-1], tuple(rows))


class _Best:
    """The parameters with the best validation loss so far."""

    def __init__(self, adapter: Adapter, settings: TrainSettings) -> None:
        self._adapter, self._patience = adapter, settings.patience
        self._loss, self._num_worse = math.inf, 0
        self._kept: list[Tensor] | None = None

    @property
    def enough(self) -> bool:
        return self._patience is not None and self._num_worse >= self._patience

    def look(self, validation: LessonTable) -> float:
        loss = self._adapter.score(validation).mean_nll
        if loss < self._loss:
            self._loss, self._num_worse = loss, 0
            self._kept = [parameter.detach().clone() for parameter in self._adapter.parameters]
        else:
            self._num_worse += 1
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self._adapter.parameters, self._kept or self._adapter.parameters, strict=True):
            parameter.copy_(value)
