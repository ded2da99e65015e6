"""Ten times as many requests as a service can write: python -m tests.bench.serve_overload.

The service of `tests.bench.serve`, on one core, with places for so many texts and a quarter as many that may wait, as
the defaults are. First one user, then as many as places (its capacity), then ten times as many users who together ask
ten times as often as it can write: how long the texts of those take who are let in, over everybody's at capacity and
over one lone user's. Percentiles are of all rounds together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml

from tests.bench.harness import print_results
from tests.bench.serve_site import NUM_PUBLISHED_USERS, NUM_USERS, TASK, TOKEN, Bench, Served, write_bench
from tests.chaos.crowd import crowd, post

NUM_CONTENTS = 20
NUM_NEW_USERS = NUM_USERS - NUM_PUBLISHED_USERS


def request_of(bench: Bench, number: int) -> bytes:
    """A request for a text that is not published; no pair comes twice among NUM_CONTENTS x NUM_NEW_USERS of them."""
    turn, user = divmod(number, NUM_NEW_USERS)
    content_id = bench.content_ids[(user + turn) % NUM_CONTENTS]
    return post(TOKEN, {"user_id": f"u{NUM_PUBLISHED_USERS + user:04d}", "content_id": content_id, "task": TASK})


def with_places(bench: Bench, num_places: int) -> Bench:
    """The same with another configuration."""
    values = yaml.safe_load(bench.config_path.read_text(encoding="utf-8"))
    values |= {"replica": {"max_waiting": max(num_places // 4, 1)}}
    values["engine"]["max_rows"] = num_places
    path = bench.config_path.with_name("overload.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return replace(bench, config_path=path)


@dataclass
class Times:
    """Seconds that each written text took, by how much was asked for, over one round or several."""

    one: list[float] = field(default_factory=list)
    capacity: list[float] = field(default_factory=list)
    overload: list[float] = field(default_factory=list)
    seconds_s: float = 0.0  # that capacity and overload lasted, each
    num_requests: int = 0  # in overload

    def add(self, other: Times) -> None:
        for name in _PHASES:
            getattr(self, name).extend(getattr(other, name))
        self.seconds_s += other.seconds_s
        self.num_requests += other.num_requests

    def figures(self) -> dict[str, float]:
        found = {
            f"{name}_p{percent}_ms": _percentile_ms(getattr(self, name), percent)
            for name in _PHASES
            for percent in (50, 99)
        }
        return found | {
            "capacity_texts_per_s": len(self.capacity) / self.seconds_s,
            "texts_per_s": len(self.overload) / self.seconds_s,
            "requests_per_s": self.num_requests / self.seconds_s,
            "p99_over_capacity": found["overload_p99_ms"] / found["capacity_p99_ms"],
            "p99_over_one": found["overload_p99_ms"] / found["one_p99_ms"],
        }


_PHASES = ("one", "capacity", "overload")


def measure(served: Served, bench: Bench, num_places: int, seconds: float) -> Times:
    """One round."""

    def ask(num_users: int, part: float, period_s: float = 0.0) -> tuple[list[float], dict[str, int]]:
        return crowd(served.port, num_users, part * seconds, lambda number: request_of(bench, number), period_s)

    ask(num_places, 0.2)  # contents are known from now on
    one, _ = ask(1, 0.5)
    capacity, _ = ask(num_places, 1.0)
    num_users = 10 * num_places
    period_s = num_users / (10 * len(capacity) / seconds)
    ask(num_users, 0.2, period_s)
    overload, counts = ask(num_users, 1.0, period_s)
    assert counts.keys() == {"200", "429"}, counts
    return Times(one, capacity, overload, seconds, sum(counts.values()))


def _percentile_ms(times: Sequence[float], percent: float) -> float:
    return float(np.percentile(times, percent)) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of overload, in each round")
    parser.add_argument("--system", choices=("e2p_ray", "e2p_ray_uvicorn"), default="e2p_ray")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores, rounds = sorted(os.sched_getaffinity(0)), list[Times]()
    with tempfile.TemporaryDirectory() as folder:
        bench = with_places(write_bench(Path(folder), NUM_CONTENTS), options.places)
        served = Served(options.system, bench, cores[:1])
        try:
            served.wait_until_ready()
            os.sched_setaffinity(0, cores[1:] or cores)
            for _ in range(options.repeats):
                rounds.append(measure(served, bench, options.places, options.seconds))
        finally:
            served.stop()
    every = Times()
    print("by round:")
    for one in rounds:
        every.add(one)
        print(", ".join(f"{name} {value:.4g}" for name, value in one.figures().items()))
    print(f"load of the machine: {psutil.getloadavg()}; all rounds together:")
    print_results(
        "serve_overload", [{"system": options.system, "places": options.places, **every.figures()}], num_threads=1
    )


if __name__ == "__main__":
    main()
