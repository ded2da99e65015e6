"""Where the real data is: beside the project, never in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("E2P_REAL_DATA", Path(__file__).resolve().parents[3] / "shared"))

needs_real_data = pytest.mark.skipif(
    not (FOLDER / "data" / "mind_contents.parquet").is_file() or not (FOLDER / "models" / "news-lm-6m").is_dir(),
    reason=f"the real data is not at {FOLDER} (set E2P_REAL_DATA to the folder that holds data/ and models/)",
)
