"""Imports point down only, heavy libraries stay in their rooms, and nothing dangerous or eager is written anywhere."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Files of one room lie in one folder or, at the top, are named here.
ROOM_OF_FILE: dict[str, str] = {}
_BASE = {"errors", "environment", "config", "schema", "storage", "ray_session", "fork_server", "engine_process"}
_MIDDLE = _BASE | {"plan", "check", "commit", "engine", "fingerprint"}
_UPPER = _MIDDLE | {"results", "generate", "loaded"}
MAY_SEE: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "schema": {"errors"},
    "storage": {"errors", "config"},
    "environment": set(),
    "idle_agent": set(),
    "forked_worker": set(),
    "fork_server": {"forked_worker", "environment"},
    "ray_session": {"errors", "environment", "idle_agent", "forked_worker"},
    "engine_process": {"config", "fork_server"},
    "plan": _BASE,
    "check": _BASE,
    "commit": _BASE,
    "engine": _BASE,
    "fingerprint": {"errors", "config", "schema"},
    "results": _MIDDLE,
    "generate": _MIDDLE | {"results"},
    "loaded": _MIDDLE | {"results", "generate"},
    "batch": _UPPER,
    "update": _BASE | {"plan", "commit", "fingerprint"},
    "serve": _UPPER | {"batch"},  # its replicas write shards, as the batch's own workers do
    "train": _UPPER,
    "upstream": _UPPER,
    "downstream": _UPPER,
    "evaluate": _UPPER | {"train", "downstream"},  # it trains the controls and hands their scores to the measures
    "demo": _UPPER | {"train", "upstream"},  # it makes its world with the real pieces
}
MAY_USE = {
    "ray": {"ray_session", "plan", "batch", "serve", "train", "upstream", "jobs"},
    "torch": {"engine", "train", "evaluate", "demo"},
    "fastapi": {"serve"},
    "transformers": {"engine", "train", "evaluate", "demo"},
}
TORCH_FREE = {
    "engine/__init__.py",
    "engine/contract.py",
    "engine/fake.py",
    "engine/manifest.py",
    "engine/node_cache.py",
}
_FORBIDDEN = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "torch.load",
    "yaml.load",
    "os.system",
}


def room_of(path: Path) -> str:
    """The room of a file under e2p_ray or jobs; the package's own __init__ belongs to none."""
    if path.parts[0] == "jobs":
        return "jobs"
    name = path.parts[1].removesuffix(".py")
    return ROOM_OF_FILE.get(name, name)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it points"
            module = node.module or ""
            inner = module in ("e2p_ray", "jobs")
            yield from ((node.lineno, f"{module}.{alias.name}" if inner else module) for alias in node.names)


def layer_problems(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of one file; `path` is relative to the repository."""
    if path == Path("e2p_ray/__init__.py"):
        return [f"{path}:{line}: the package itself imports nothing" for line, _ in imports(ast.parse(source))][:1]
    room, found = room_of(path), []
    if room != "jobs" and room not in MAY_SEE:
        return [f"{path}: in no known room; give {room!r} a place in MAY_SEE"]
    for line, name in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top == "e2p_ray" and room != "jobs":
            other = room_of(Path("e2p_ray", rest.split(".")[0] + ".py"))
            if other != room and other not in MAY_SEE[room]:
                found.append(f"{path}:{line}: {room} must not see {other}")
        elif top == "jobs" and room != "jobs":
            found.append(f"{path}:{line}: the package must not see the jobs")
        elif top in MAY_USE and room not in MAY_USE[top]:
            found.append(f"{path}:{line}: {room} must not import {top}")
        if top == "torch" and str(path.relative_to("e2p_ray") if room != "jobs" else path) in TORCH_FREE:
            found.append(f"{path}:{line}: this file is for drivers and must not import torch")
    return found


def danger_problems(path: Path, source: str) -> list[str]:
    """Calls that run what somebody else wrote, and calls at the top of a module."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in _FORBIDDEN:
                found.append(f"{path}:{node.lineno}: {name}")
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell") and ast.unparse(keyword.value) != "False":
                    found.append(f"{path}:{node.lineno}: {keyword.arg} is not False")
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "cloudpickle", "dill"):
            found.append(f"{path}:{node.lineno}: {node.module}")
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
            found.append(f"{path}:{statement.lineno}: work at import")
        if isinstance(statement, ast.For | ast.While | ast.With | ast.Try):
            found.append(f"{path}:{statement.lineno}: work at import")
    return found


def sources() -> list[Path]:
    found = [*(ROOT / "e2p_ray").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def test_imports_point_down_only() -> None:
    problems = [p for path in sources() for p in layer_problems(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert len(sources()) > 30
    assert not problems, "\n".join(problems)


def test_nothing_dangerous_and_no_work_at_import() -> None:
    problems = [p for path in sources() for p in danger_problems(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("e2p_ray/errors.py", "import e2p_ray.config"),
        ("e2p_ray/schema.py", "from e2p_ray.storage import Storage"),
        ("e2p_ray/check.py", "from e2p_ray import plan"),
        ("e2p_ray/plan.py", "from e2p_ray.commit.run import Run"),
        ("e2p_ray/commit/run.py", "from e2p_ray.generate import Generator"),
        ("e2p_ray/batch/__init__.py", "from e2p_ray.train import train"),
        ("e2p_ray/generate.py", "def f():\n    import e2p_ray.batch"),
        ("e2p_ray/generate.py", "import jobs.cli"),
        ("e2p_ray/fingerprint.py", "from e2p_ray.plan import Plan"),
        ("e2p_ray/update/update.py", "from e2p_ray.generate import Generator"),
        ("e2p_ray/update/update.py", "from e2p_ray.batch import run_batch"),
        ("e2p_ray/commit/run.py", "import ray.data"),
        ("e2p_ray/downstream/report.py", "from torch import nn"),
        ("e2p_ray/engine/fake.py", "import torch"),
        ("e2p_ray/engine/decode.py", "import ray"),
        ("e2p_ray/__init__.py", "from e2p_ray.config import JobConfig"),
        ("e2p_ray/registry.py", "import os"),
        ("jobs/plan.py", "import torch"),
    ],
)
def test_control_a_wrong_import_is_found(path: str, source: str) -> None:
    assert layer_problems(Path(path), source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\nx = pickle.load(open('x', 'rb'))",
        "from pickle import load",
        "def f(p):\n    return torch.load(p)",
        "def f(p):\n    return yaml.load(p)",
        "def f(p):\n    return eval(p)",
        "def f(p):\n    exec(p)",
        "def f(p):\n    return AutoModel.from_pretrained(p, trust_remote_code=True)",
        "def f(p, yes):\n    return AutoModel.from_pretrained(p, trust_remote_code=yes)",
        "print('hello')",
        "for x in range(3):\n    pass",
    ],
)
def test_control_a_dangerous_line_is_found(source: str) -> None:
    assert danger_problems(Path("e2p_ray/check.py"), source)


def test_control_good_lines_pass() -> None:
    assert not layer_problems(Path("e2p_ray/generate.py"), "from e2p_ray.check import check\nimport polars")
    assert not layer_problems(Path("jobs/plan.py"), "from e2p_ray.plan import Plan\nfrom jobs.cli import Job")
    assert not danger_problems(Path("e2p_ray/check.py"), '"""Doc."""\nimport yaml\nX = 1\nY = yaml.safe_load("1")')


_MODELS = ("torch", "transformers")
# One process imports them one after the other: what one of them may bring, none below it forbids.
LIGHT: dict[str, tuple[str, ...]] = {
    "e2p_ray.config": (*_MODELS, "ray", "pyarrow", "boto3"),
    "jobs.generate": (*_MODELS, "ray", "pyarrow", "boto3"),
    "jobs.backfill": (*_MODELS, "ray", "pyarrow", "boto3"),
    "e2p_ray.fingerprint": (*_MODELS, "ray", "deltalake"),
    "e2p_ray.serve.client": (*_MODELS, "ray", "deltalake", "fastapi"),
    "e2p_ray.train.job.board": (*_MODELS, "ray"),
    "e2p_ray.commit": (*_MODELS, "ray"),
    "e2p_ray.generate": _MODELS,
    "e2p_ray.engine.fake": _MODELS,
    "e2p_ray.engine.manifest": _MODELS,
    "e2p_ray.batch": (*_MODELS, "ray.data"),
    "e2p_ray.batch.worker": (*_MODELS, "ray.serve", "fastapi"),
    "e2p_ray.train.job.contract": _MODELS,
    "jobs.whole_run": (*_MODELS, "ray.data"),
    "jobs.train": _MODELS,
    "jobs.evaluate": _MODELS,
    "jobs.serve": _MODELS,
    "e2p_ray.train.data.rows": _MODELS,
}


def heavy_imports(light: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """What each of these modules brought that it must not bring."""
    code = f"""
import importlib, json, sys
for name, absent in {light}.items():
    importlib.import_module(name)
    print(json.dumps([name, sorted(set(absent) & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name: found for name, found in map(json.loads, done.stdout.splitlines()) if found}


def test_drivers_and_workers_stay_light() -> None:
    assert heavy_imports(LIGHT) == {}


def test_control_a_heavy_import_is_found() -> None:
    assert heavy_imports({"e2p_ray.config": ("torch",), "e2p_ray.errors": ("pydantic",)}) == {
        "e2p_ray.errors": ["pydantic"]
    }
