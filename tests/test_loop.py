"""What is kept compiled is thrown away when anything that it was made of changes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from e2p_ray.engine import loop

ENGINE = Path(loop.__file__).parent


def imported(name: str) -> Iterator[str]:
    """Files of the engine that a file of it takes at its top."""
    for node in ast.parse((ENGINE / name).read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("e2p_ray.engine"):
            inner = (node.module or "").split(".")[2:]
            yield from (f"{file}.py" for file in inner[:1] or [alias.name for alias in node.names])


def reached(files: set[str]) -> set[str]:
    """These files, and all that they are made of."""
    found: set[str] = set()
    while files:
        found |= files
        files = {other for name in files for other in imported(name)} - found
    return found


def test_every_file_behind_a_loop_decides_where_it_is_kept() -> None:
    with_loops = {path.name for path in ENGINE.glob("*.py") if "loop.py" in imported(path.name)}
    assert {"flash.py", "products.py", "calls.py"} < with_loops, "the control: they hold loops"
    assert reached(with_loops) == set(loop._SOURCES)
    assert {"llvm.py", "tiles.py"} <= reached(with_loops) - with_loops, "the control: what loops are made of counts"
