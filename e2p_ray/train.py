"""Trains a projector on texts that were right for their users; the base model stays as it is.

Nothing before the soft token depends on the user, so a content's keys and values are computed once, without gradient,
kept, and read by all its users' rows; only soft token, cue after and target run with gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import TaskConfig
from e2p_ray.engine.manifest import BaseModelFolder, Kind, Layout, ProjectorManifest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.engine.prompt import PromptLayout, Segments
from e2p_ray.engine.shared_prefix import Prefix, Shape, attention, merge
from e2p_ray.errors import ConfigError, RowError, RunError
from e2p_ray.schema import Content, UserEmbedding


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a projector is trained; `target_prefix` by language stands before every target, as English's space does."""

    num_steps: int = 300
    contents_per_step: int = 8
    users_per_content: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    kind: Kind = "mlp"
    layout: Layout = "content_first"
    hidden_dim: int = 256
    num_soft_tokens: int = 1
    dropout: float = 0.0
    max_target_tokens: int = 64
    max_prefix_bytes: int = 1 << 30  # kept keys and values of contents; the least recently used are dropped
    target_prefix: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """One text that was right for a user and a content."""

    user_id: str
    content_id: str
    task: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class UserTable:
    """User embeddings (n, d), finite, of one embedding space; `reference` rows are what the projector normalises by."""

    user_ids: Sequence[str]
    user_embeddings: npt.NDArray[np.float32]
    embedding_space: str


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained projector and how it came about; losses are nats per target token, one a step."""

    projector: Projector
    losses: tuple[float, ...]
    num_examples: int
    num_skipped: Mapping[str, int]
    base_model_hash: str  # of the weights; equal before and after


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One target as tokens, and its user's embedding."""

    user_embedding: UserEmbedding
    target: tuple[int, ...]
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """All rows of one content and task: they share the segments."""

    segments: Segments
    rows: tuple[Row, ...]


def train_projector(
    base: BaseModel,
    folder: BaseModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    settings: TrainSettings,
    on_progress: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a new projector; `on_progress` gets the number of steps done and the step's loss.

    Targets of unknown users or contents are skipped and counted. Raises ConfigError when none is left, RunError when
    the loss is not finite or the base model changed.
    """
    before = base.weights_hash()
    lessons, skipped = make_lessons(tokenizer, tasks, users, contents, targets, settings, base.max_positions)
    torch.manual_seed(settings.seed)
    projector = new_projector(base, folder, users, settings)
    losses = _fit(base, projector, lessons, settings, on_progress)
    after = base.weights_hash()
    if after != before:
        raise RunError("the base model's weights changed while the projector was trained. This is a bug: report it")
    num_examples = sum(len(lesson.rows) for lesson in lessons)
    return TrainResult(projector.eval().requires_grad_(False), tuple(losses), num_examples, skipped, after)


def new_projector(base: BaseModel, folder: BaseModelFolder, users: UserTable, settings: TrainSettings) -> Projector:
    """An untrained projector that fits this base model and these users."""
    provenance: dict[str, Any] = {**asdict(settings), "target_prefix": dict(settings.target_prefix)}
    manifest = ProjectorManifest(
        embedding_dim=users.user_embeddings.shape[1],
        embedding_space=users.embedding_space,
        d_model=base.d_model,
        base_model_id=folder.base_model_id,
        tokenizer_hash=folder.tokenizer_hash,
        output_rms=base.token_embedding_rms,
        kind=settings.kind,
        layout=settings.layout,
        hidden_dim=settings.hidden_dim,
        num_soft_tokens=settings.num_soft_tokens,
        dropout=settings.dropout,
        trained=provenance,
    )
    reference = ReferenceStatistics.of(torch.from_numpy(users.user_embeddings))
    return Projector(manifest, reference).to(base.device)


def make_lessons(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    settings: TrainSettings,
    max_positions: int,
) -> tuple[list[Lesson], dict[str, int]]:
    """Targets grouped by content and task, in the order of their keys, and how many were skipped for what."""
    layout = PromptLayout(
        tokenizer, settings.layout, tasks, num_soft_tokens=settings.num_soft_tokens, max_positions=max_positions
    )
    row_of = {user_id: row for row, user_id in enumerate(users.user_ids)}
    content_of = {content.content_id: content for content in contents}
    skipped = {"unknown_user": 0, "missing_content": 0, "empty_text": 0, "prompt_too_long": 0}
    groups: dict[tuple[str, str], list[Row]] = {}
    for target in targets:
        content = content_of.get(target.content_id)
        if target.user_id not in row_of:
            skipped["unknown_user"] += 1
        elif content is None:
            skipped["missing_content"] += 1
        elif not target.text.strip():
            skipped["empty_text"] += 1
        else:
            text = settings.target_prefix.get(content.language, "") + target.text
            ids = tokenizer.encode(text, add_special_tokens=False)[: settings.max_target_tokens - 1]
            row = Row(users.user_embeddings[row_of[target.user_id]], (*ids, _end_token(tokenizer)), target.weight)
            groups.setdefault((target.content_id, target.task), []).append(row)
    lessons = []
    for (content_id, task), rows in sorted(groups.items()):
        try:
            lessons.append(Lesson(layout.segments(content_of[content_id], task), tuple(rows)))
        except RowError:
            skipped["prompt_too_long"] += len(rows)
    if not lessons:
        raise ConfigError(
            f"none of the {len(targets)} targets can be used (skipped: {skipped}). Give targets whose user_id is in "
            "the users table with a user embedding and whose content_id is in the contents table"
        )
    return lessons, skipped


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the base model's tokenizer has no end token: a projector could not learn where a text ends")
    return int(tokenizer.eos_token_id)


def prefixes_of(store: PrefixStore, base: BaseModel, lefts: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Keys and values of the tokens before the soft token, of length 0 where there are none."""
    empty = torch.empty(1, base.num_kv_heads, 0, base.head_dim, dtype=base.dtype, device=base.device)
    nothing = Prefix((empty,) * base.num_layers, (empty,) * base.num_layers, 0)
    return [prefix or nothing for prefix in store.get(lefts)]


class TeachingStep:
    """A differentiable forward pass over C contents x m rows of q own tokens, behind prefixes padded to one length."""

    def __init__(self, prefixes: Sequence[Prefix], rows_per_content: int, num_tokens: int) -> None:
        self._rows, self._tokens = rows_per_content, num_tokens
        self._prefixes = prefixes
        device = prefixes[0].keys[0].device
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=device)
        self._longest = int(lengths.max())
        self._seen = torch.arange(self._longest, device=device) < lengths[:, None]  # (C, longest)
        at = torch.arange(num_tokens, device=device)
        self._causal = at[None, :] <= at[:, None]
        self._distance = at[:, None] - at[None, :]
        self.position_ids = (lengths.repeat_interleave(rows_per_content)[:, None] + at).contiguous()

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        own = self._causal if shape.window is None else self._causal & (self._distance < shape.window)
        mine = attention(queries, keys, values, shape, visible=own[None, None])
        if self._longest == 0:
            return mine[0]
        return merge(self._attend_prefixes(layer, queries, keys.shape[1], shape), mine)

    def _attend_prefixes(self, layer: int, queries: Tensor, num_kv_heads: int, shape: Shape) -> tuple[Tensor, Tensor]:
        count, m = len(self._prefixes), self._rows
        _, num_heads, q, head_dim = queries.shape
        keys = self._padded([prefix.keys[layer] for prefix in self._prefixes])
        values = self._padded([prefix.values[layer] for prefix in self._prefixes])
        # (C m, H, q, D) -> (C, Hkv, m group q, D): the rows of a content ask in one call
        grid = queries.reshape(count, m, num_kv_heads, -1, head_dim).transpose(1, 2)
        stacked = grid.reshape(count, num_kv_heads, -1, head_dim)
        visible = self._seen[:, None, None, :]
        if shape.window is not None and self._longest + q > shape.window:
            near = torch.arange(self._longest, device=queries.device) > self.position_ids[..., None] - shape.window
            near = near.view(count, m, 1, q, -1).expand(count, m, num_heads // num_kv_heads, q, -1)
            visible = visible & near.reshape(count, 1, -1, self._longest)
        output, lse = attention(stacked, keys, values, shape, visible=visible)
        output = output.view(count, num_kv_heads, m, -1, head_dim).transpose(1, 2).reshape(queries.shape)
        lse = lse.view(count, num_kv_heads, m, -1).transpose(1, 2).reshape(count * m, num_heads, q)
        return output, lse

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        missing = [self._longest - part.shape[2] for part in parts]
        return torch.cat([nn.functional.pad(p, (0, 0, 0, gap)) for p, gap in zip(parts, missing, strict=True)])


def target_loss(
    base: BaseModel, projector: Projector, prefixes: Sequence[Prefix], lessons: Sequence[Lesson]
) -> tuple[Tensor, int]:
    """Weighted mean cross-entropy (nats per token) over the targets of lessons, and the number of tokens.

    Lessons of fewer rows than the largest are padded with rows of weight 0.
    """
    rows_per_content = max(len(lesson.rows) for lesson in lessons)
    filled = [_fill_up(lesson.rows, rows_per_content) for lesson in lessons]
    rows = [row for group in filled for row in group]
    rights = [lesson.segments.right for lesson in lessons for _ in range(rows_per_content)]
    num_soft = projector.manifest.num_soft_tokens
    length = max(len(right) + len(row.target) - 1 for right, row in zip(rights, rows, strict=True))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.zeros(len(rows), num_soft + length, dtype=torch.long)
    weights = torch.zeros(len(rows), num_soft + length)
    for place, (right, row) in enumerate(zip(rights, rows, strict=True)):
        tokens = (*right, *row.target[:-1])
        ids[place, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        span = slice(num_soft + len(right) - 1, num_soft + len(right) - 1 + len(row.target))
        labels[place, span] = torch.tensor(row.target)
        weights[place, span] = row.weight
    device = base.device
    soft = projector(torch.from_numpy(np.stack([row.user_embedding for row in rows])).to(device))
    embedded = torch.cat([soft.to(base.dtype), base.embed(ids.to(device))], dim=1)
    step = TeachingStep(prefixes, rows_per_content, embedded.shape[1])
    hidden = base.hidden(embedded, step.position_ids, step)
    keep = (weights > 0).to(device)
    losses = nn.functional.cross_entropy(base.logits(hidden[keep]), labels.to(device)[keep], reduction="none")
    shares = weights.to(device)[keep]
    return (losses * shares).sum() / shares.sum(), int(keep.sum())


def _fill_up(rows: Sequence[Row], size: int) -> list[Row]:
    nobody = Row(rows[0].user_embedding, rows[0].target[:1], 0.0)
    return [*rows, *[nobody] * (size - len(rows))]


def _fit(
    base: BaseModel,
    projector: Projector,
    lessons: Sequence[Lesson],
    settings: TrainSettings,
    on_progress: Callable[[int, float], None] | None,
) -> list[float]:
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    store = PrefixStore(base, settings.max_prefix_bytes)
    projector.train()
    losses: list[float] = []
    for step, chosen in enumerate(_draws(lessons, settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        prefixes = prefixes_of(store, base, [lesson.segments.left for lesson in chosen])
        loss, _ = target_loss(base, projector, prefixes, chosen)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RunError(
                f"the loss became {losses[-1]} at step {step}. Lower the learning rate, or look for user embeddings "
                "that are far larger than the others"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(projector.parameters(), settings.clip_norm)
        optimizer.step()
        if on_progress is not None:
            on_progress(step + 1, losses[-1])
    return losses


def _schedule(step: int, settings: TrainSettings) -> float:
    """Warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))


def _draws(lessons: Sequence[Lesson], settings: TrainSettings) -> Iterator[list[Lesson]]:
    """The lessons of every step: all contents in a random order, again and again, some of each one's rows."""
    random = np.random.default_rng(settings.seed)
    waiting: list[int] = []
    for _ in range(settings.num_steps):
        while len(waiting) < min(settings.contents_per_step, len(lessons)):
            waiting += random.permutation(len(lessons)).tolist()
        places, waiting = waiting[: settings.contents_per_step], waiting[settings.contents_per_step :]
        chosen = []
        for lesson in (lessons[place] for place in places):
            count = min(settings.users_per_content, len(lesson.rows))
            some = random.choice(len(lesson.rows), size=count, replace=False)
            chosen.append(Lesson(lesson.segments, tuple(lesson.rows[i] for i in some)))
        yield chosen
