"""Online texts against the service one would write by hand: python -m tests.bench.serve.

Both answer the same requests over real HTTP, each in processes of its own on one core, with the users on the other: a
Llama of 29 M parameters with random weights, fp32, contents of 256 tokens, 16 new tokens, soft token last. Users ask,
wait and ask again; all of a load's requests are about eight contents, which nobody has asked for before.
`e2p_ray` is `jobs.serve` as it is (Ray Serve, checks, consent, limits), `hf_service` is tests/bench/serve_peer.py, and
`e2p_ray_uvicorn` the same API without Ray. They take turns within a round; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests.bench.harness import print_results
from tests.bench.serve_load import Load, load
from tests.bench.serve_site import NUM_PUBLISHED_USERS, NUM_USERS, TASK, Bench, Served, write_bench

BASELINE = "hf_service"
SYSTEMS = (BASELINE, "e2p_ray", "e2p_ray_uvicorn")
LEVELS = (1, 4, 16)
NUM_SHARED = 8  # contents of one load
REQUESTS = {1: 24, 4: 40, 16: 64}  # and a third as many as streams
QUICK_REQUESTS = {1: 6, 4: 8, 16: 32}
NUM_PAIRS, NUM_CANDIDATES = 32, 16
EXTRAS = ("published", "draft", "scores")
Figures = dict[str, float]


@dataclass(frozen=True)
class Round:
    """What a round draws from: contents that nobody has asked for, and its own random numbers."""

    bench: Bench
    number: int
    requests: dict[int, int]
    rng: np.random.Generator

    def bodies(self, num_users: int, stream: bool) -> list[dict[str, Any]]:
        """Requests of one level, no two alike."""
        place = (self.number * len(LEVELS) + LEVELS.index(num_users)) * 2 + stream
        shared = self.bench.content_ids[place * NUM_SHARED : (place + 1) * NUM_SHARED]
        number = self.requests[num_users] // (3 if stream else 1)
        users = self.rng.permutation(np.arange(NUM_PUBLISHED_USERS, NUM_USERS))[:number]
        contents = self.rng.permutation(number) % NUM_SHARED
        return [
            {"user_id": f"u{user:04d}", "content_id": shared[at], "task": TASK, "stream": stream}
            for user, at in zip(users, contents, strict=True)
        ]

    def published(self) -> list[dict[str, Any]]:
        pairs = [(f"u{n:04d}", content) for n in range(NUM_PUBLISHED_USERS) for content in self.bench.published_ids]
        chosen = self.rng.permutation(len(pairs))[:NUM_PAIRS]
        return [{"user_id": pairs[at][0], "content_id": pairs[at][1], "task": TASK} for at in chosen]


def measure_level(served: Sequence[Served], of_round: Round, num_users: int) -> dict[str, tuple[Figures, list[str]]]:
    """Every system's figures and its texts, on the same requests."""
    plain, streamed = (of_round.bodies(num_users, stream) for stream in (False, True))
    found = {}
    for one in served:
        whole = load(one.port, "/v1/generations", plain, num_users)
        parts = load(one.port, "/v1/generations", streamed, num_users)
        texts = [answer.body["text"] for answer in (*whole.answers, *parts.answers)]
        states = {answer.body["status"] for answer in (*whole.answers, *parts.answers)}
        assert states == {"ok"}, f"{one.name}: {states}: a text was rejected and written twice"
        figures = {
            "p50_ms": whole.percentile_ms(50),
            "p99_ms": whole.percentile_ms(99),
            "first_token_ms": parts.first_token_ms,
            "texts_per_s": whole.texts_per_s,
        }
        found[one.name] = (figures, texts)
    return found


def measure_extras(one: Served, of_round: Round, extras: Sequence[str]) -> dict[str, Figures]:
    """Published texts, the same as drafts, rankings: what the service by hand does not have."""
    found, pairs = dict[str, Figures](), of_round.published()
    if "published" in extras:
        seen = load(one.port, "/v1/generations", pairs, 1)
        assert {answer.body["source"] for answer in seen.answers} == {"published"}
        found["published"] = _times(seen)
    if "draft" in extras:
        found |= _drafts(one, of_round, pairs)
    if "scores" in extras:
        rankings = [
            {"user_id": pair["user_id"], "task": TASK, "candidates": _candidates(of_round)} for pair in pairs[:8]
        ]
        found[f"scores of {NUM_CANDIDATES}"] = _times(load(one.port, "/v1/scores", rankings, 1))
    return found


def _drafts(one: Served, of_round: Round, pairs: Sequence[dict[str, Any]]) -> dict[str, Figures]:
    """User embeddings that have moved a little: known by name there is a published text, nameless there is none."""
    drafted, alone = [], []
    for pair in pairs:
        vector = np.array(of_round.bench.vectors[pair["user_id"]])
        vector += 1e-4 * of_round.rng.standard_normal(len(vector))
        alone.append({"embedding": vector.tolist(), "embedding_space": "space-1"} | pair)
        del alone[-1]["user_id"]
        drafted.append(alone[-1] | {"user_id": pair["user_id"]})
    both = {"draft": list[Any](), "decoded": list[Any]()}
    for at in range(len(pairs)):  # turn by turn, each first every other time
        for name in sorted(both, reverse=bool(at % 2)):
            body = (drafted if name == "draft" else alone)[at]
            both[name].append(load(one.port, "/v1/generations", [body], 1).answers[0])
    equal = [a.body["text"] == b.body["text"] for a, b in zip(*both.values(), strict=True)]
    assert {answer.body["source"] for answers in both.values() for answer in answers} == {"generated"}
    found = {name: _times(Load(answers, 1.0)) for name, answers in both.items()}
    found["draft"] |= {"p50_ratio": found["decoded"]["p50_ms"] / found["draft"]["p50_ms"]}
    found["draft"] |= {"equal_texts": float(np.mean(equal))}
    return found


def _candidates(of_round: Round) -> list[dict[str, str]]:
    letters = of_round.rng.choice(list("abcdefghijklmnop"), (NUM_CANDIDATES, 16))
    ids = of_round.bench.published_ids
    return [{"content_id": ids[at % len(ids)], "text": "".join(row)} for at, row in enumerate(letters)]


def _times(seen: Load) -> Figures:
    return {"p50_ms": seen.percentile_ms(50), "p99_ms": seen.percentile_ms(99)}


def lines_of(rounds: Sequence[dict[tuple[str, str], Figures]], texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Medians over rounds, and ratios over the baseline: throughput, and how many times longer its p99 is."""
    lines = list[dict[str, Any]]()
    for case, system in dict.fromkeys(key for one in rounds for key in one):
        seen = [one[case, system] for one in rounds]
        figures = {name: statistics.median(one[name] for one in seen) for name in seen[0]}
        lines.append({"case": case, "system": system, **figures})
    bases: dict[str, dict[str, Any]] = {line["case"]: line for line in lines if line["system"] == BASELINE}
    for line in lines:
        base = bases.get(line["case"])
        if base is not None:
            line["ratio"] = line["texts_per_s"] / base["texts_per_s"]
            line["p99_ratio"] = base["p99_ms"] / line["p99_ms"]
            line["equal_texts"] = float(np.mean(np.array(texts[line["system"]]) == np.array(texts[BASELINE])))
            line["distinct_texts"] = len(set(texts[line["system"]])) / len(texts[line["system"]])
    return lines


@contextmanager
def services(names: Sequence[str], bench: Bench) -> Iterator[list[Served]]:
    """All of them, loaded, on the first core; this process on the others."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        found = []
        for name in names:
            found.append(Served(name, bench, cores[:1]))
            stack.callback(found[-1].stop)
            found[-1].wait_until_ready()
        os.sched_setaffinity(0, cores[1:] or cores)
        yield found


def run(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    requests, rng = QUICK_REQUESTS if options.quick else REQUESTS, np.random.default_rng(7)
    rounds, texts = list[dict[tuple[str, str], Figures]](), {name: list[str]() for name in options.systems}
    with services(options.systems, bench) as served:
        warm_up = Round(bench, options.repeats, QUICK_REQUESTS, rng)
        measure_level(served, warm_up, LEVELS[-1])
        for number in range(options.repeats):
            of_round, found = Round(bench, number, requests, rng), dict[tuple[str, str], Figures]()
            for level in (level for level in LEVELS if str(level) in options.only):
                turns = served[number % len(served) :] + served[: number % len(served)]
                for name, (figures, written) in measure_level(turns, of_round, level).items():
                    found[str(level), name] = figures
                    texts[name] += written
            for one in served:
                if one.name != BASELINE:
                    for case, figures in measure_extras(one, of_round, options.only).items():
                        found[case, one.name] = figures
            rounds.append(found)
    return lines_of(rounds, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*map(str, LEVELS), *EXTRAS]
    parser.add_argument("--only", action="append", choices=names, help="numbers of users and other cases")
    parser.add_argument("--systems", default=",".join(SYSTEMS[:2]), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    options = parser.parse_args()
    options.systems = options.systems.split(",")
    options.only = options.only or names
    options.repeats = 1 if options.quick else options.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = write_bench(Path(folder), (options.repeats + 1) * len(LEVELS) * 2 * NUM_SHARED)
        results = run(bench, options)
    print(f"load of the machine: {psutil.getloadavg()}")
    print_results("serve", results, num_threads=1)


if __name__ == "__main__":
    main()
