"""Base model, projector and engine, loaded once, and the one path over them: what batch workers and replicas hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from e2p_ray.config import JobConfig, ProjectorConfig, SamplingConfig, for_language
from e2p_ray.engine.contract import EngineStats, Listener, ServingEngine, TextEngine
from e2p_ray.generate import Generator
from e2p_ray.results import Result
from e2p_ray.schema import Content, DeadLetter, Generation, Group, Request, RequestKey, TextScore
from e2p_ray.storage import Storage

EngineFactory = Callable[[JobConfig, Storage], TextEngine]


class LoadedGenerator:
    """A configuration's engine and its generator. Loading raises the RunError that says why these do not fit.

    All but reading another projector belongs to one thread: the engine's.
    """

    def __init__(
        self,
        config: JobConfig,
        storage: Storage,
        run_id: str,
        *,
        engine_factory: EngineFactory | None = None,
        engine: TextEngine | None = None,
    ) -> None:
        self.config, self._storage, self._run_id = config, storage, run_id
        self._engine_factory = engine_factory
        self.engine = engine or (engine_factory or _load_engine)(config, storage)
        self._generator = Generator(self.engine, config, run_id)

    @property
    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self.engine.stats

    @property
    def projector_id(self) -> str:
        return self.engine.projector_id

    @property
    def base_model_id(self) -> str:
        return self.engine.base_model_id

    @property
    def embedding_space(self) -> str:
        return self.engine.embedding_space

    @property
    def embedding_dim(self) -> int:
        return self.engine.embedding_dim

    def generate(self, groups: Sequence[Group], *, shard_id: str = "") -> tuple[list[Generation], list[DeadLetter]]:
        """See `Generator.generate`."""
        return self._generator.generate(groups, shard_id=shard_id)

    def follow(self, groups: Iterable[Group | None], give: Callable[[Result], None]) -> None:
        """See `Generator.follow`."""
        self._generator.follow(groups, give)

    def fingerprint_of(self, request: Request, content: Content) -> str:
        """What the fingerprint of this request's row would be; on any thread."""
        return self._generator.fingerprint_of(request, content)

    # -- what serving needs besides: the engine must be a ServingEngine -----------------------------------------------

    def as_trained(self, text: str, language: str) -> str:
        """A text for `score` as the projector met such ones in its training: behind its language's prefix."""
        prefix = for_language(self._serving.target_prefixes, language) or ""
        return text if text.startswith(prefix) else prefix + text

    def score(self, groups: Sequence[Group], texts: Mapping[RequestKey, str]) -> list[TextScore]:
        """See `ScoringEngine.score`."""
        return list(self._serving.score(groups, texts))

    @contextmanager
    def followed_by(self, listener: Listener) -> Iterator[None]:
        """Within, the listener hears of all that is written; without, whoever did before."""
        engine = self._serving
        before, engine.listener = engine.listener, listener
        try:
            yield
        finally:
            engine.listener = before

    def for_run(self, config: JobConfig, run_id: str, max_rows: int, max_prefill_tokens: int) -> LoadedGenerator:
        """The same for a run's shards, in steps that online requests need not wait for long; on any thread.

        `config` is the run's, with the texts of this one's. See `ServingEngine.with_bounds`.
        """
        engine = self._serving.with_bounds(max_rows, max_prefill_tokens)
        return LoadedGenerator(config, self._storage, run_id, engine=engine)

    def with_sampling(self, task: str, sampling: SamplingConfig) -> LoadedGenerator:
        """The same for a task with another sampling, as a job with that sampling would be; on any thread."""
        tasks = self.config.tasks | {task: self.config.tasks[task].model_copy(update={"sampling": sampling})}
        config = self.config.model_copy(update={"tasks": tasks})
        return LoadedGenerator(config, self._storage, self._run_id, engine=self._serving.with_tasks(tasks))

    def read_projector(self, uri: str) -> Callable[[], LoadedGenerator]:
        """Read another projector, on any thread; what is returned makes its generator, on the engine's thread.

        The base model and the prefixes are shared. Raises the RunError that says why the projector does not fit.
        """
        config = self.config.model_copy(update={"projector": ProjectorConfig(uri=uri)})
        if self._engine_factory is None:
            from e2p_ray.engine.engine import Engine
            from e2p_ray.engine.projector import Projector

            engine, projector = self.engine, Projector.from_pretrained(self._storage, uri)
            assert isinstance(engine, Engine), "only our own engine is served"
            return lambda: self._with(config, engine.with_projector(projector))
        made = self._engine_factory(config, self._storage)
        return lambda: self._with(config, made)

    def _with(self, config: JobConfig, engine: TextEngine) -> LoadedGenerator:
        return LoadedGenerator(config, self._storage, self._run_id, engine_factory=self._engine_factory, engine=engine)

    @property
    def _serving(self) -> ServingEngine:
        return cast(ServingEngine, self.engine)


def _load_engine(config: JobConfig, storage: Storage) -> TextEngine:
    # torch is loaded in the workers, not in the driver
    with _collector_at_rest():
        if config.engine.kind == "vllm":
            from e2p_ray.engine.vllm_engine import load_vllm_engine

            return load_vllm_engine(config, storage)
        from e2p_ray.engine.engine import load_engine

        return load_engine(config, storage)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Within, Python looks for no cycles of garbage.

    torch, transformers and numba come with half a million objects that stay, and it went through all there was seven
    times: 1.2 of 4.0 s of imports and 0.3 of 1.4 s of loading (2026-11-23, a Zen 5 core).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
