"""Drafts against a full run: python -m tests.bench.backfill.

A backfill after something changed for a part of the users: every request comes with the text that was published, and a
share of the texts stays the same. First texts online, for users who are alike in kinds: what was written for one of
them is a guess for the next. `kept`: a backfill of few contents, kept from call to call, so that steps are all that is
left. Full and drafted run on the same pairs, in calls of a few rows (online, small groups: a pass is bound by its
weights and launches) up to a full wave (bound by arithmetic: nothing to gain, nothing to lose). A 30 M Llama with
random weights that writes letters only, so that texts are tokens; nothing of the engine is replaced.

It ends with code 1 and says why where a text differs with drafts, and where drafts were to be right and none was
accepted. `accepted` is empty where none was tried: passes over so many rows are too dear for guesses.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from e2p_ray.config import EngineConfig
from e2p_ray.engine.contract import EngineStats
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.schema import Completion, Group, RequestKey, UserEmbedding
from tests.bench.harness import interleaved, print_results
from tests.bench.workloads import MODEL_SIZES, Case, ModelSize, groups_of, llama, tasks_of, wide_tokenizer
from tests.listening import Listening
from tests.tiny_models import EMBEDDING_DIM, keep_letters_only, random_model, random_projector

ROWS_PER_CALL = (1, 4, 16, 64, 256)
UNCHANGED = (0.8, 1.0, 0.0)
NEW_TOKENS = 24
# Standard deviation of random weights with which all users' texts of a content differ from the first letters to the
# last (64 of 64; with 0.04 48, and those end alike): wrong drafts are wrong.
_WEIGHTS_STD = 0.08
_NEAR = 0.01  # how far users of a kind are from its middle, of how far kinds are from each other
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def model_of_letters(size: ModelSize) -> PreTrainedModel:
    """A random model whose texts read back as the tokens that it wrote."""
    config = llama(size, _WEIGHTS_STD)
    config.tie_word_embeddings = False  # contents are not letters alone
    model = random_model(config)
    keep_letters_only(model, wide_tokenizer(), _LETTERS)
    return model


def base_of_letters(size: ModelSize, dtype: torch.dtype) -> BaseModel:
    """The same, packed."""
    base = BaseModel(model_of_letters(size).to(dtype))
    base.pack()
    return base


def with_drafts(calls: Sequence[Group], texts: dict[RequestKey, str]) -> list[Group]:
    return [
        replace(group, requests=tuple(replace(request, draft=texts[request.key]) for request in group.requests))
        for group in calls
    ]


def changed(calls: Sequence[Group], share: float, seed: int = 1) -> list[Group]:
    """The same requests, with another user embedding for so many of them."""
    rng = np.random.default_rng(seed)
    keys = [request.key for group in calls for request in group.requests]
    chosen = {keys[at] for at in rng.permutation(len(keys))[: round(share * len(keys))]}
    found = []
    for group in calls:
        requests = tuple(
            replace(request, user_embedding=rng.standard_normal(EMBEDDING_DIM).astype(np.float32))
            if request.key in chosen
            else request
            for request in group.requests
        )
        found.append(replace(group, requests=requests))
    return found


def alike(groups: Sequence[Group], num_kinds: int, seed: int = 2) -> list[Group]:
    """The same requests of users of so many kinds, who are next to each other."""
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((num_kinds, EMBEDDING_DIM)).astype(np.float32)

    def embedding() -> UserEmbedding:
        found: UserEmbedding = kinds[rng.integers(num_kinds)] + _NEAR * rng.standard_normal(EMBEDDING_DIM)
        return found.astype(np.float32)

    return [
        replace(group, requests=tuple(replace(one, user_embedding=embedding()) for one in group.requests))
        for group in groups
    ]


def in_calls(groups: Iterable[Group], rows_per_call: int) -> list[Group]:
    """Each content's requests a few at a time."""
    return [
        replace(group, requests=group.requests[first : first + rows_per_call])
        for group in groups
        for first in range(0, len(group.requests), rows_per_call)
    ]


def measure(
    base: BaseModel, num_rows: int, rows_per_call: int, unchanged: float, num_repeats: int
) -> list[dict[str, Any]]:
    """A backfill: a line for the full run, one for the drafted."""
    case = Case(num_rows // rows_per_call, rows_per_call, 128, NEW_TOKENS)
    name = _named(f"unchanged{unchanged * 100:.0f}", rows_per_call)
    return _backfilled(base, case, name, groups_of(case), unchanged, num_repeats)


def measure_kept(base: BaseModel, rows_per_call: int, unchanged: float, num_repeats: int) -> list[dict[str, Any]]:
    """The same of few contents, whose shared part each call finds kept."""
    case = Case(3, 32, 128, NEW_TOKENS)
    name = _named(f"kept{unchanged * 100:.0f}", rows_per_call)
    return _backfilled(base, case, name, in_calls(groups_of(case), rows_per_call), unchanged, num_repeats)


def _backfilled(
    base: BaseModel, case: Case, name: str, before: Sequence[Group], unchanged: float, num_repeats: int
) -> list[dict[str, Any]]:
    """What these calls wrote is published; then other user embeddings for those that do not stay unchanged."""
    published = _written(base, case, before, drafts=False).texts
    calls = changed(before, 1 - unchanged)

    def same_share(texts: Mapping[RequestKey, str]) -> float:
        return float(np.mean([text == published[key] for key, text in texts.items()]))

    return _compared(base, case, name, calls, with_drafts(calls, published), num_repeats, same_share)


def measure_first(base: BaseModel, rows_per_call: int, num_repeats: int) -> list[dict[str, Any]]:
    """The same of texts that are asked for online, for users of four kinds: what was written for others is a guess."""
    case = Case(3, 32, 128, NEW_TOKENS)
    calls = in_calls(alike(groups_of(case), 4), rows_per_call)

    def told_share(texts: Mapping[RequestKey, str]) -> float:
        """Of texts that had been written for another user of their content."""
        return 1 - len({(key.content_id, text) for key, text in texts.items()}) / len(texts)

    name = _named("first", rows_per_call)
    return _compared(base, case, name, calls, calls, num_repeats, told_share, is_followed=True)


def _named(kind: str, rows_per_call: int) -> str:
    return kind + ("" if rows_per_call == 1 else f" {rows_per_call} rows a call")


@dataclass(frozen=True)
class _Written:
    """What an engine wrote, and the time that it took."""

    texts: dict[RequestKey, str]
    stats: EngineStats
    rows_per_s: float


def _written(
    base: BaseModel, case: Case, calls: Sequence[Group], *, drafts: bool, is_followed: bool = False
) -> _Written:
    """By a new engine, every group in a call of its own; `is_followed`: online, where somebody waits for each text."""
    projector = random_projector(base.d_model, output_rms=base.token_embedding_rms)
    config = EngineConfig(max_rows=256, drafts=drafts)
    engine = Engine(base, projector, wide_tokenizer(), tasks_of(case), config)
    engine.listener = Listening() if is_followed else None
    completions: list[Completion] = []
    start = time.perf_counter()
    for group in calls:
        completions += engine.generate([group])
    seconds_s = time.perf_counter() - start
    return _Written(_read_back(completions), engine.stats, len(completions) / seconds_s)


def _compared(
    base: BaseModel,
    case: Case,
    name: str,
    calls: Sequence[Group],
    drafted: Sequence[Group],
    num_repeats: int,
    same_share: Callable[[Mapping[RequestKey, str]], float],
    *,
    is_followed: bool = False,
) -> list[dict[str, Any]]:
    """A line for these calls without drafts, one with; `same_share` of the texts could be guessed."""
    last: dict[str, _Written] = {}

    def rate(system: str, calls: Sequence[Group]) -> float:
        last[system] = _written(base, case, calls, drafts=system == "drafts", is_followed=is_followed)
        return last[system].rows_per_s

    rate("drafts", drafted[:1])  # what a pass costs is measured for the first draft of a base model
    runs = {"full": lambda: rate("full", calls), "drafts": lambda: rate("drafts", drafted)}
    rates = interleaved(name, runs, num_repeats)
    texts, stats = last["full"].texts, last["drafts"].stats
    num_tried, num_accepted = stats.num_draft_tokens, stats.num_accepted_tokens
    equal = float(np.mean([texts[key] == text for key, text in last["drafts"].texts.items()]))
    rows_per_call = len(calls[0].requests)
    common = {"case": name, "rows_per_call": rows_per_call, "same_texts": same_share(texts)}
    return [
        common | {"system": "full", "rows_per_s": rates["full"], "ratio": 1.0},
        common
        | {
            "system": "drafts",
            "rows_per_s": rates["drafts"],
            "ratio": rates["drafts"] / rates["full"],
            "equal_to_full": equal,
            "draft_tokens": num_tried,
            "accepted": num_accepted / num_tried if num_tried else None,
            "pass_cost": base.pass_cost and dict(zip(base.pass_cost.sizes, base.pass_cost.costs, strict=True)),
        },
    ]


def _read_back(completions: Iterable[Completion]) -> dict[RequestKey, str]:
    """Texts by key; AssertionError for one that is not the tokens it was written as: no draft could be right."""
    texts = {}
    for completion in completions:
        num_tokens = len(wide_tokenizer().encode(completion.text, add_special_tokens=False))
        assert num_tokens == completion.num_output_tokens == NEW_TOKENS, f"not its own tokens: {completion}"
        texts[completion.key] = completion.text
    return texts


def problems_of(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """What must not be, whatever the times: other texts with drafts, and no draft accepted where some were right.

    A row alone tries its draft on any machine; more rows a call need not, but what they try is not all wrong.
    """
    found = []
    for line in results:
        if line["system"] != "drafts":
            continue
        if line["equal_to_full"] < 1:
            found.append(f"{line['case']}: {1 - line['equal_to_full']:.1%} of the texts differ with drafts")
        tries = line["rows_per_call"] == 1 or line["draft_tokens"]
        if tries and line["same_texts"] and not line["accepted"]:
            found.append(f"{line['case']}: none of {line['draft_tokens']} draft tokens accepted: nothing is measured")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256, help="rows a run, at least")
    parser.add_argument("--quick", action="store_true", help="one repeat, only 80 %% unchanged")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = base_of_letters(MODEL_SIZES["30m"], getattr(torch, options.dtype))
    num_repeats = 1 if options.quick else options.repeats
    results = []
    for unchanged in UNCHANGED[: 1 if options.quick else None]:
        for rows in ROWS_PER_CALL:
            num_rows = max(options.rows // (1 if rows > 4 else 4), rows)
            results += measure(base, num_rows, rows, unchanged, num_repeats)
    for rows in ROWS_PER_CALL[: 1 if options.quick else 3]:
        results += measure_kept(base, rows, UNCHANGED[0], num_repeats)
        results += measure_first(base, rows, num_repeats)
    print_results("backfill", [{"dtype": options.dtype, **line} for line in results], num_threads=options.threads)
    if problems := problems_of(results):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
