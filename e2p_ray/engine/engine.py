"""The engine: groups in, completions out, each content prefilled once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import EngineConfig, JobConfig, TaskConfig
from e2p_ray.engine.admission import Bounds, bounds_on
from e2p_ray.engine.contract import EngineStats, Listener
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.drafts import Drafts, Experience
from e2p_ray.engine.manifest import BaseModelFolder, check_compatible, load_manifest
from e2p_ray.engine.model import BaseModel, pick_device
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.engine.prompted import PromptedEngine
from e2p_ray.engine.score import MAX_SCORED_ROWS, Scorer
from e2p_ray.engine.stopping import Stopping
from e2p_ray.errors import IncompatibleError
from e2p_ray.schema import Completion, Group, RequestKey, TextScore
from e2p_ray.storage import Storage


class Engine(PromptedEngine):
    """A frozen base model and a projector; the contract is `engine.contract.TextEngine`."""

    def __init__(
        self,
        base: BaseModel,
        projector: Projector,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, TaskConfig],
        config: EngineConfig,
        *,
        retry_temperature: float = 0.7,
        store: PrefixStore | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__(
            projector.manifest,
            base.d_model,
            tokenizer,
            tasks,
            max_positions=base.max_positions,
            retry_temperature=retry_temperature,
        )
        self._base, self._tokenizer, self._config = base, tokenizer, config
        samplings = {name: task.sampling for name, task in tasks.items()}
        ends = _end_tokens(base, tokenizer)
        stopping = Stopping(tokenizer, base.vocab_size, ends, samplings)
        projector = projector.to(base.device)
        bounds = bounds or bounds_on(base.device, config)
        # That which projectors learn to end a text with; the others only end what the model writes.
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
        drafts = Drafts(tokenizer, end, Experience())
        self._decoder = Decoder(
            base,
            projector,
            stopping,
            bounds,
            drafts if config.drafts else None,
            store,
        )
        self._scorer = Scorer(
            base,
            projector,
            tokenizer,
            self.layout,
            end_token=end,
            store=self._decoder.store,
            max_rows=min(bounds.max_rows, MAX_SCORED_ROWS),
            max_bytes=bounds.max_bytes,
        )

    @property
    def stats(self) -> EngineStats:
        return self._decoder.stats

    @property
    def listener(self) -> Listener | None:
        """See `ServingEngine.listener`."""
        return self._decoder.listener

    @listener.setter
    def listener(self, listener: Listener | None) -> None:
        self._decoder.listener = listener

    def with_bounds(self, max_rows: int, max_prefill_tokens: int) -> Self:
        """See `ServingEngine.with_bounds`."""
        other, bounds = copy.copy(self), self._decoder.given_bounds
        other._decoder = self._decoder.with_bounds(
            Bounds(min(max_rows, bounds.max_rows), bounds.max_bytes // 2, max_prefill_tokens)
        )
        return other

    def with_projector(self, projector: Projector) -> Engine:
        """An engine for another projector on the same base model, sharing model and prefixes with this one.

        A prefix is what stands left of the soft token: no projector has a part in it. The bounds are this one's, whose
        own prefixes and slots would count as memory that is not free. Raises IncompatibleError for a
        projector of another base model or tokenizer.
        """
        mine = self._manifest
        check_compatible(projector.manifest, BaseModelFolder(Path(), mine.base_model_id, mine.tokenizer_hash))
        return Engine(
            self._base,
            projector,
            self._tokenizer,
            self._tasks,
            self._config,
            retry_temperature=self._retry_temperature,
            store=self._decoder.store,
            bounds=self._decoder.given_bounds,
        )

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        """See `TextEngine.generate`. Completions come as rows finish; groups are read a wave ahead at most."""
        return self._decoder.run(self._rows(groups))

    def score(self, groups: Iterable[Group], texts: Mapping[RequestKey, str]) -> Iterator[TextScore]:
        """See `ScoringEngine.score`; each content is prefilled once, for scoring and generating alike."""
        return self._scorer.run(groups, texts)


def _end_tokens(base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text: the model's generation config and the tokenizer's own."""
    generation = getattr(base.model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    ids = [found] if isinstance(found, int) else list(found or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    """What changes when a file of a folder is written or replaced; empty where there is no such folder."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return [(path.name, *(stat.st_size, stat.st_mtime_ns, stat.st_ino)) for path in files for stat in [path.stat()]]


def load_engine(config: JobConfig, storage: Storage) -> Engine:
    """The engine of a job: projector and base model are found to belong together before the model is loaded."""
    given = Path(config.base_model.uri)  # a folder of this machine may change; what is fetched has a name of its own
    before = _stamps(given)
    manifest, folder = load_manifest(config, storage)
    device = pick_device(config.base_model.device, num_gpus=config.workers.num_gpus)
    if device.type == "cpu":
        torch.set_num_threads(config.engine.num_threads or max(int(config.workers.num_cpus), 1))
    projector = Projector.from_pretrained(storage, config.projector.uri)
    if projector.manifest != manifest:
        raise IncompatibleError(f"{config.projector.uri}: replaced while it was being loaded. Run the command again")
    base = BaseModel.load(folder.path, config.base_model.dtype, device)
    tokenizer = load_tokenizer(folder.path)
    if _stamps(given) != before:
        raise IncompatibleError(f"{given}: replaced while it was being loaded. Run the command again")
    base.pack(keep_plain=bool(config.engine.keep_plain))
    return Engine(
        base,
        projector,
        tokenizer,
        config.tasks,
        config.engine,
        retry_temperature=config.checks.retry_temperature,
    )
