"""An engine on vLLM, for base models that need several GPUs; the contract is `engine.contract.TextEngine`.

Chosen by `engine.kind: vllm`; needs the extra `[vllm]`, imported only when an engine is made. Prompts are the same
as the engine's of our own, embedded here (vLLM takes soft tokens in no other form) and shared between the users of a
content by vLLM's prefix cache, which compares whole blocks: the last, unfilled one is computed for every user.

Greedy texts are the base model's own, as with our engine. Sampled ones follow another random stream: vLLM draws with a
generator a request, seeded from the same key, so that they repeat but differ from those of our engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import JobConfig, SamplingConfig, TaskConfig
from e2p_ray.engine.contract import EngineStats
from e2p_ray.engine.manifest import load_manifest
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import Segments, load_tokenizer
from e2p_ray.engine.prompted import PromptedEngine
from e2p_ray.engine.row import Row, rows_at_hand
from e2p_ray.engine.stopping import Stopping
from e2p_ray.engine.vllm_core import end_tokens, num_positions, read_config, read_token_embedding, start_vllm
from e2p_ray.errors import ConfigError, IncompatibleError
from e2p_ray.schema import Completion, ErrorCode, FinishReason, Group, RequestKey, UserEmbedding
from e2p_ray.storage import Storage


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One request, ready to be given to vLLM."""

    key: RequestKey
    segments: Segments
    soft: Tensor | None  # (k, d_model)
    sampling: SamplingConfig
    stream: int

    @property
    def num_prompt_tokens(self) -> int:
        return self.segments.num_tokens + (0 if self.soft is None else len(self.soft))


@dataclass(slots=True, eq=False)
class _Running:
    """What a row has written so far."""

    row: _Row
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    num_chars: int = 0  # an upper bound


class VllmEngine(PromptedEngine):
    """A base model served by vLLM and a projector. Prompts are embedded here, texts end as in our own engine."""

    def __init__(
        self,
        vllm_engine: Any,
        folder: Path,
        dtype: torch.dtype,
        projector: Projector,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, TaskConfig],
        *,
        max_rows: int,
        retry_temperature: float = 0.7,
    ) -> None:
        config = read_config(folder)
        super().__init__(
            projector.manifest,
            config.hidden_size,
            tokenizer,
            tasks,
            max_positions=num_positions(config, tokenizer, tasks, projector.manifest.num_soft_tokens),
            retry_temperature=retry_temperature,
        )
        _refuse_penalties(tasks)
        self._vllm = vllm_engine
        self._projector = projector
        self._max_rows = max_rows
        self._embedding = read_token_embedding(folder).to(dtype)
        self._end_tokens = end_tokens(folder, tokenizer)
        samplings = {name: task.sampling for name, task in tasks.items()}
        self._stopping = Stopping(tokenizer, config.vocab_size, self._end_tokens, samplings)
        self._numbers = itertools.count()  # vLLM's request ids
        self.stats = EngineStats()

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        """See `TextEngine.generate`. At most max_rows requests are with vLLM; drafts are not used."""
        rows = self._embedded(self._rows(groups))
        running: dict[str, _Running] = {}
        try:
            while True:
                more, refused = rows_at_hand(rows, self._max_rows - len(running))
                for row in more:
                    running[self._submit(row)] = _Running(row)
                yield from refused
                if running:
                    yield from self._step(running)
                elif not refused:
                    return
        finally:
            self._vllm.abort_request(list(running))

    # -- requests go in ----------------------------------------------------------------------------------------------

    def _embedded(self, rows: Iterable[Row | Completion | None]) -> Iterator[_Row | Completion | None]:
        for given in rows:
            if given is None or isinstance(given, Completion):
                yield given
                continue
            soft = None if given.user_embedding is None else self._soft(given.user_embedding)
            row = _Row(given.key, given.segments, soft, given.sampling, given.stream)
            finite = soft is None or bool(torch.isfinite(soft).all())
            yield row if finite else _error(row, ErrorCode.NON_FINITE_LOGITS)

    @torch.inference_mode()
    def _soft(self, user_embedding: UserEmbedding) -> Tensor:
        """(k, d_model) in the base model's dtype."""
        soft: Tensor = self._projector(torch.from_numpy(user_embedding[None]))[0]
        return soft.to(self._embedding.dtype)

    @torch.inference_mode()
    def _submit(self, row: _Row) -> str:
        """Hand a row to vLLM; always as embeddings: where both kinds are mixed, its prefix cache confuses them."""
        left, right = (
            self._embedding[torch.tensor(ids, dtype=torch.long)] for ids in (row.segments.left, row.segments.right)
        )
        embeds = torch.cat([left, right] if row.soft is None else [left, row.soft, right])
        name = str(next(self._numbers))
        self._vllm.add_request(name, {"prompt_embeds": embeds}, self._params(row))
        self.stats = replace(
            self.stats,
            num_prompt_tokens=self.stats.num_prompt_tokens + row.num_prompt_tokens,
            num_truncated=self.stats.num_truncated + row.segments.truncated,
        )
        return name

    def _params(self, row: _Row) -> Any:
        """vLLM's form of our sampling. It stops at end tokens; stop strings and characters are ours to see."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = row.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=row.stream >> 1,  # vLLM takes 63 bits
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(self._end_tokens),
            ignore_eos=True,
            logprobs=0,  # that of the chosen token, before temperature
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    # -- tokens come out ---------------------------------------------------------------------------------------------

    def _step(self, running: dict[str, _Running]) -> list[Completion]:
        """One step of vLLM's; the rows that are done leave `running`, and vLLM where it would go on."""
        finished, aborted = [], []
        for output in self._vllm.step():
            if output.request_id not in running:
                continue  # one more token of a row that has ended here
            state = running[output.request_id]
            if not state.tokens:
                num_computed = state.row.num_prompt_tokens - (output.num_cached_tokens or 0)
                self.stats = replace(self.stats, num_computed_tokens=self.stats.num_computed_tokens + num_computed)
            completion = self._take(state, output.outputs[0])
            if completion is None and output.finished:
                completion = _error(state.row, ErrorCode.OUT_OF_MEMORY)
            if completion is not None:
                finished.append(completion)
                del running[output.request_id]
                if not output.finished:
                    aborted.append(output.request_id)
        if aborted:
            self._vllm.abort_request(aborted)
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1)
        return finished

    def _take(self, state: _Running, output: Any) -> Completion | None:
        """Append new tokens one by one; a completion once the row is done."""
        for token, logprobs in zip(output.token_ids, output.logprobs or (), strict=True):
            state.tokens.append(int(token))
            state.logprob += logprobs[token].logprob
            self.stats = replace(self.stats, num_output_tokens=self.stats.num_output_tokens + 1)
            if not np.isfinite(state.logprob):
                return _error(state.row, ErrorCode.NON_FINITE_LOGITS)
            reason = self._finish_reason(state)
            if reason is not None:
                return Completion(
                    key=state.row.key,
                    text=self._stopping.text(np.array(state.tokens), state.row.sampling),
                    finish_reason=reason,
                    num_prompt_tokens=state.row.num_prompt_tokens,
                    num_output_tokens=len(state.tokens),
                    mean_logprob=state.logprob / len(state.tokens),
                    truncated=state.row.segments.truncated,
                )
        return None

    def _finish_reason(self, state: _Running) -> FinishReason | None:
        """As our own engine decides it, after every token."""
        sampling, tokens = state.row.sampling, np.array(state.tokens)
        last = tokens[-1:]
        state.num_chars += int(self._stopping.max_chars_of(last)[0])
        is_end, is_last = bool(self._stopping.is_end(last)[0]), len(tokens) >= sampling.max_new_tokens
        long = sampling.max_chars is not None and state.num_chars > sampling.max_chars
        reason = None
        may_stop = bool(self._stopping.may_stop(self._stopping.number_of(sampling.stop), last)[0])
        if is_end or is_last or long or may_stop:
            reason = self._stopping.reason(tokens, sampling)
        if reason is None and is_end:
            return FinishReason.END_TOKEN
        return FinishReason.MAX_TOKENS if reason is None and is_last else reason


def _refuse_penalties(tasks: Mapping[str, TaskConfig]) -> None:
    for name, task in tasks.items():
        if task.sampling.repetition_penalty != 1.0 or task.sampling.no_repeat_ngram_tokens:
            raise ConfigError(
                f"tasks.{name}.sampling: vLLM has no penalties for prompts that are embeddings. Set "
                "repetition_penalty to 1 and no_repeat_ngram_tokens to 0, or engine.kind to native"
            )


def _error(row: _Row, code: ErrorCode) -> Completion:
    return Completion(row.key, "", FinishReason.ERROR, row.num_prompt_tokens, 0, 0.0, code, row.segments.truncated)


def load_vllm_engine(config: JobConfig, storage: Storage) -> VllmEngine:
    """The engine of a job: projector and base model are found to belong together before the model is loaded."""
    manifest, folder = load_manifest(config, storage)
    projector = Projector.from_pretrained(storage, config.projector.uri)
    if projector.manifest != manifest:
        raise IncompatibleError(f"{config.projector.uri}: replaced while it was being loaded. Run the command again")
    model, tokenizer = read_config(folder.path), load_tokenizer(folder.path)
    max_positions = num_positions(model, tokenizer, config.tasks, manifest.num_soft_tokens)
    return VllmEngine(
        start_vllm(folder.path, config.base_model.dtype, config.engine, max_positions),
        folder.path,
        getattr(torch, config.base_model.dtype),
        projector,
        tokenizer,
        config.tasks,
        max_rows=config.engine.usual_rows,
        retry_temperature=config.checks.retry_temperature,
    )
