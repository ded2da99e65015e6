"""The walk of one row in the README is what the code does."""

from __future__ import annotations

from pathlib import Path

from tests.walk import walk

GOLDEN = Path(__file__).parent / "golden" / "walk.md"


def test_golden_walk_is_current(tmp_path: Path) -> None:
    expected = GOLDEN.read_text(encoding="utf-8")
    found = walk(tmp_path) + "\n"
    assert found == expected, "the code's walk differs: look at it, then python -m tests.walk > tests/golden/walk.md"


def test_walk_does_not_depend_on_where_it_is_made(tmp_path: Path) -> None:
    assert walk(tmp_path / "a") == walk(tmp_path / "b")
    assert str(tmp_path) not in walk(tmp_path / "c")


def test_walk_shows_every_stage_and_no_user_embedding(tmp_path: Path) -> None:
    page = walk(tmp_path)
    for stage in range(1, 7):
        assert f"**{stage}. " in page
    assert "It cost 40 million dollars, 5 million more than planned." in page
    assert "foreign_number" in page
    assert "1.0, 0.0" not in page
