"""Ten times as many requests as a service can write: python -m tests.bench.serve_overload.

The service of `tests.bench.serve`, on one core, with places for so many texts and a quarter as many that may wait, as
the defaults are. First one user, then as many as places (its capacity), then ten times as many users who together ask
ten times as often as it can write: how long those wait who are let in, over how long everybody did at capacity.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    values |= {"replica": {"max_waiting": num_places // 4}}
    values["engine"]["max_rows"] = num_places
    path = bench.config_path.with_name("overload.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return replace(bench, config_path=path)


def measure(served: Served, bench: Bench, num_places: int, seconds: float) -> dict[str, float]:
    """One round."""

    def ask(num_users: int, part: float, period_s: float = 0.0) -> tuple[list[float], dict[str, int]]:
        return crowd(served.port, num_users, part * seconds, lambda number: request_of(bench, number), period_s)

    ask(num_places, 0.2)  # contents are known from now on
    alone, _ = ask(1, 0.3)
    full, _ = ask(num_places, 0.5)
    texts_per_s = len(full) / (0.5 * seconds)
    num_users = 10 * num_places
    period_s = num_users / (10 * texts_per_s)
    ask(num_users, 0.2, period_s)
    let_in, counts = ask(num_users, 1.0, period_s)
    assert counts.keys() == {"200", "429"}, counts
    found = {"requests_per_s": sum(counts.values()) / seconds, "texts_per_s": len(let_in) / seconds}
    for name, times in (("one", alone), ("capacity", full), ("overload", let_in)):
        found |= {f"{name}_p{percent}_ms": _percentile_ms(times, percent) for percent in (50, 99)}
    found |= {"capacity_texts_per_s": texts_per_s, "p99_ratio": found["overload_p99_ms"] / found["capacity_p99_ms"]}
    return found


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
    cores, rounds = sorted(os.sched_getaffinity(0)), list[dict[str, float]]()
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
    medians: dict[str, Any] = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    ratios = [round(one["p99_ratio"], 2) for one in rounds]
    print(f"load of the machine: {psutil.getloadavg()}; p99 ratios by round: {ratios}")
    print_results("serve_overload", [{"system": options.system, "places": options.places, **medians}], num_threads=1)


if __name__ == "__main__":
    main()
