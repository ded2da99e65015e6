"""What loading an engine does to its process."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from e2p_ray.engine import engine
from e2p_ray.errors import RunError
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.storage import Storage


@pytest.mark.parametrize("is_on", [True, False])
def test_pythons_collector_rests_while_an_engine_is_loaded(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bool]()

    def failing(*_: object) -> None:
        seen.append(gc.isenabled())
        raise RunError("no such engine")

    monkeypatch.setattr(engine, "load_engine", failing)
    config: Any = SimpleNamespace(engine=SimpleNamespace(kind="e2p"))
    before = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        with pytest.raises(RunError, match="no such engine"):
            LoadedGenerator(config, Storage(), "run")
        assert seen == [False]
        assert gc.isenabled() is is_on, "it is again as it was"
    finally:
        (gc.enable if before else gc.disable)()
