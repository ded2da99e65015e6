"""Cluster files from one settings file, and what the schedule's pod runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import end, guarded
from jobs.cluster_files import KINDS, render
from jobs.cluster_settings import SETTINGS, load_settings
from jobs.cluster_submit import ACCOUNT, IN_CLUSTER, Api, submit
from jobs.steps import say

_PROG = "jobs.cluster"


def main(argv: Sequence[str] | None = None) -> int:
    """`render` or `submit`."""
    options, rest = _parser().parse_known_args(argv)
    if options.verb == "submit":
        if rest:
            _parser().error(f"unknown: {' '.join(rest)}")
        return guarded(lambda: say(submit(options.manifest, Api(options.server, options.account))), _PROG)
    return guarded(lambda: print(_rendered(options, rest), end=""), _PROG)


def _rendered(options: argparse.Namespace, words: Sequence[str]) -> str:
    return render(options.kind, load_settings(options.settings, words), options.config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {_PROG}", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    rendering = verbs.add_parser(
        "render",
        allow_abbrev=False,
        help="print manifests: python -m jobs.cluster render generate --config job.yaml | kubectl apply -f -",
        description="generate, train: a RayJob. schedule: a CronJob that makes the RayJob of generate. raycronjob:\n"
        "the operator's own schedule. serve: a RayService. aws: the file for `ray up`. Every key of the settings is\n"
        "an option as well.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rendering.add_argument("kind", choices=KINDS)
    rendering.add_argument("--config", type=Path, metavar="FILE", help="the job's configuration (not for aws)")
    rendering.add_argument("--settings", type=Path, metavar="FILE", default=SETTINGS, help=f"default: {SETTINGS.name}")
    submitting = verbs.add_parser("submit", help="inside a pod: make a RayJob anew, unless it is still at work")
    submitting.add_argument("manifest", type=Path)
    submitting.add_argument("--server", default=IN_CLUSTER, help="Kubernetes' API")
    submitting.add_argument("--account", type=Path, default=ACCOUNT, help="the folder of token and ca.crt")
    return parser


if __name__ == "__main__":
    end(main())
