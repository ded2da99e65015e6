"""Options of what a run may cost."""

from __future__ import annotations

import argparse


def add_limits(parser: argparse.ArgumentParser) -> None:
    """To a parser; `jobs.whole_run.limits_of` reads them."""
    parser.add_argument("--max-requests", type=int, metavar="N", help="write N requests at most, keep the rest")
    parser.add_argument(
        "--max-seconds",
        type=float,
        metavar="S",
        help="begin no shard after S seconds of generation (each worker counts from its first shard), keep the rest",
    )
    parser.add_argument(
        "--priority",
        metavar="COLUMN",
        help="what comes first under a limit: a numeric column of the candidates table, highest value first, `rank` "
        "lowest first, or COLUMN:asc, COLUMN:desc (default: requests without a text, then the oldest texts)",
    )
    parser.add_argument(
        "--no-publish", action="store_true", help="stop before publishing; `jobs.publish` does it later"
    )
