"""What engines have in common that write with a projector and a prompt layout: ids, and requests turned into rows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

from transformers import PreTrainedTokenizerBase

from e2p_ray.config import SamplingConfig, TaskConfig
from e2p_ray.engine.manifest import ProjectorManifest
from e2p_ray.engine.prompt import PromptLayout
from e2p_ray.engine.row import Row
from e2p_ray.engine.streams import stream_key
from e2p_ray.errors import IncompatibleError, RowError
from e2p_ray.schema import Completion, ErrorCode, FinishReason, Group


class PromptedEngine:
    """The part of `TextEngine` that does not depend on what runs the model.

    Raises IncompatibleError for a projector whose soft tokens have another width than the base model's tokens.
    """

    def __init__(
        self,
        manifest: ProjectorManifest,
        d_model: int,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, TaskConfig],
        *,
        max_positions: int,
        retry_temperature: float,
    ) -> None:
        if manifest.d_model != d_model:
            raise IncompatibleError(
                f"projector {manifest.projector_id} makes soft tokens of width {manifest.d_model}, the base model's "
                f"tokens have {d_model}. Use the base model it was trained for: {manifest.base_model_id}"
            )
        self._manifest = manifest
        self._tasks = tasks
        self._retry_temperature = retry_temperature
        self.layout = PromptLayout(
            tokenizer, manifest.layout, tasks, num_soft_tokens=manifest.num_soft_tokens, max_positions=max_positions
        )

    @property
    def projector_id(self) -> str:
        return self._manifest.projector_id

    @property
    def base_model_id(self) -> str:
        return self._manifest.base_model_id

    @property
    def embedding_space(self) -> str:
        return self._manifest.embedding_space

    @property
    def embedding_dim(self) -> int:
        return self._manifest.embedding_dim

    @property
    def target_prefixes(self) -> Mapping[str, str]:
        """See `ServingEngine.target_prefixes`."""
        return self._manifest.target_prefixes

    def prompt_id(self, task: str, language: str) -> str:
        return self.layout.prompt_id(task, language)

    def with_tasks(self, tasks: Mapping[str, TaskConfig]) -> Self:
        """See `ServingEngine.with_tasks`."""
        assert tasks.keys() == self._tasks.keys(), "other samplings of the same tasks"
        assert all(task.sampling.stop == self._tasks[name].sampling.stop for name, task in tasks.items())
        other = copy.copy(self)
        other._tasks, other.layout = tasks, self.layout.with_tasks(tasks)
        return other

    def _rows(self, groups: Iterable[Group | None]) -> Iterator[Row | Completion | None]:
        """The requests as rows; a completion for those whose prompt cannot be made. None stays None."""
        for group in groups:
            if group is None:
                yield None
                continue
            sampling = self._sampling(group.task, group.attempt)
            try:
                segments = self.layout.segments(group.content, group.task)
            except RowError as error:
                code = ErrorCode(error.code)
                yield from (Completion(r.key, "", FinishReason.ERROR, 0, 0, 0.0, code) for r in group.requests)
                continue
            for request in group.requests:
                stream = stream_key(request.key, sampling.seed, group.attempt)
                yield Row(request.key, segments, request.user_embedding, sampling, stream, request.draft)

    def _sampling(self, task: str, attempt: int) -> SamplingConfig:
        sampling = self._tasks[task].sampling
        if attempt == 0:
            return sampling
        return sampling.model_copy(update={"temperature": max(sampling.temperature, self._retry_temperature)})
