"""The real tasks by name. As a command: python -m tests.real.task NAME FOLDER writes one task's tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.real.data import FOLDER
from tests.real.huffpost import write_huffpost
from tests.real.mind_titles import write_mind
from tests.real.pens import write_pens
from tests.real.persona import write_persona
from tests.real.tables import RealTask

__all__ = ["WRITERS", "RealTask"]

WRITERS: Mapping[str, Callable[[Path, Path], RealTask]] = {
    "pens": write_pens,
    "huffpost": write_huffpost,
    "mind": write_mind,
    "persona": write_persona,
    "persona_new": partial(write_persona, new_characters=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(WRITERS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(WRITERS[options.name](FOLDER / "data", options.folder).describe())


if __name__ == "__main__":
    main()
