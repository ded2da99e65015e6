"""What the README says of the code is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from e2p_ray.schema import ErrorCode

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_walk_is_the_golden_one() -> None:
    walk = (ROOT / "tests" / "golden" / "walk.md").read_text(encoding="utf-8").strip()
    assert walk in section("One row's walk"), "copy tests/golden/walk.md between the walk marks"


def test_the_file_map_names_files_that_exist_and_all_of_the_engine() -> None:
    named = set(re.findall(r"[a-z_]+\.py", section("Where things are")))
    files = {path.name for folder in ("e2p_ray", "jobs") for path in (ROOT / folder).rglob("*.py")}
    assert not named - files
    engine = {path.name for path in (ROOT / "e2p_ray" / "engine").glob("*.py")} - {"__init__.py"}
    assert not engine - named
    rooms = {path.name for path in (ROOT / "e2p_ray").iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.name for path in (ROOT / "e2p_ray").glob("*.py") if path.name != "__init__.py"}
    assert not {room for room in rooms if room not in section("Where things are")}


def test_commands_and_links_lead_somewhere() -> None:
    for module in set(re.findall(r"python -m ([a-z_.]+)", README)):
        assert importlib.util.find_spec(module) is not None, module
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for command in ("jobs/demo", "tests/check"):
        assert (ROOT / command).stat().st_mode & 0o111, f"{command} is not executable"


def test_every_dead_letter_code_is_explained() -> None:
    assert not [code for code in ErrorCode if f"`{code}`" not in section("What becomes of bad rows")]
