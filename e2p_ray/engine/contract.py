"""What every engine offers: the contract between `generate.py` and an engine, with or without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Protocol, Self

from e2p_ray.config import TaskConfig
from e2p_ray.schema import Completion, Group, RequestKey, TextScore


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Work done since the engine was made; take two and subtract to measure one shard."""

    num_prompt_tokens: int = 0  # summed over requests, as if nothing were shared
    num_computed_tokens: int = 0  # prompt tokens really run through the model
    num_output_tokens: int = 0
    num_steps: int = 0  # decode steps, each for all rows of a wave
    num_prefix_tokens: int = 0  # tokens of shared prefixes, each counted once per prefill
    num_waves: int = 0
    num_truncated: int = 0  # completions whose content had lost its tail
    num_draft_tokens: int = 0  # guessed, and run through the model
    num_accepted_tokens: int = 0  # of those, the ones that the model wrote as well

    def __sub__(self, earlier: EngineStats) -> EngineStats:
        return EngineStats(
            num_prompt_tokens=self.num_prompt_tokens - earlier.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens - earlier.num_computed_tokens,
            num_output_tokens=self.num_output_tokens - earlier.num_output_tokens,
            num_steps=self.num_steps - earlier.num_steps,
            num_prefix_tokens=self.num_prefix_tokens - earlier.num_prefix_tokens,
            num_waves=self.num_waves - earlier.num_waves,
            num_truncated=self.num_truncated - earlier.num_truncated,
            num_draft_tokens=self.num_draft_tokens - earlier.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens - earlier.num_accepted_tokens,
        )


class Artifacts(Protocol):
    """The ids of what texts are made with; `commit.run.ARTIFACTS` names them."""

    @property
    def projector_id(self) -> str: ...

    @property
    def base_model_id(self) -> str: ...

    @property
    def embedding_space(self) -> str: ...


class TextEngine(Artifacts, Protocol):
    """Writes one raw text a request; what becomes of it is decided in `generate.py`.

    A text depends on its request, content and attempt only: never on its neighbours, their order or the worker.
    """

    @property
    def embedding_dim(self) -> int: ...

    @property
    def stats(self) -> EngineStats: ...

    def prompt_id(self, task: str, language: str) -> str:
        """Stable hash of the prompt's template and layout."""
        ...

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        """Exactly one completion a request, in any order; an error in one row is a completion with an error code.

        Groups are read while others are written: those that come later join them. None among them says that none
        waits now; an engine that has nothing to write then is done. A key may come again once it has been completed.
        A request without a user embedding is written without a soft token. An attempt above 0 samples with the checks'
        retry temperature from another random stream. A request's draft never changes its text.
        """
        ...


class ScoringEngine(TextEngine, Protocol):
    """An engine that also says how likely a given text is."""

    def score(self, groups: Iterable[Group], texts: Mapping[RequestKey, str]) -> Iterator[TextScore]:
        """One score for every request of the groups, in any order; a text is taken as it is, with its leading blank."""
        ...


class Listener(Protocol):
    """Who follows an engine while it writes: asked once between two steps, on the engine's own thread."""

    def between_steps(self) -> None:
        """Time for other work, also for another `generate` of the same engine, from its beginning to its end."""
        ...

    def cancelled(self) -> Set[RequestKey]:
        """Requests that nobody waits for any more: each leaves now, as a completion with the code `cancelled`."""
        ...

    def streamed(self) -> Set[RequestKey]:
        """Requests whose text is wanted while it is written."""
        ...

    def on_text(self, key: RequestKey, text: str) -> None:
        """All that a streamed request has written so far, unchecked; a further attempt begins anew."""
        ...


class ServingEngine(ScoringEngine, Protocol):
    """An engine that can be followed while it writes, and asked for other samplings."""

    listener: Listener | None  # of every `generate` from now on

    @property
    def target_prefixes(self) -> Mapping[str, str]:
        """What stood before every text that the projector was trained on, by language, as an English text's space."""
        ...

    def with_bounds(self, max_rows: int, max_prefill_tokens: int) -> Self:
        """The same engine with smaller steps, and counts and a listener of its own: for work that others interrupt.

        A step writes a token for `max_rows` rows at most, or computes `max_prefill_tokens` of prefixes, one prefix at
        least. Model and projector are shared; prefixes are its own, so that it takes none of the others' room. It and
        this one write by turns as with `with_tasks`, and together take half as many bytes again as this one alone.
        """
        ...

    def with_tasks(self, tasks: Mapping[str, TaskConfig]) -> Self:
        """The same engine for the same tasks with other samplings: all but the stop strings may differ.

        Model, projector and prefixes are shared with this one; at most one of them writes at a time, or within the
        other's `between_steps`.
        """
        ...
