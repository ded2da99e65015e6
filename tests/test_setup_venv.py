"""jobs/setup-venv: a .venv that was left half made is made anew, and one that was filled is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Python as Debian has it: without python3-venv, all of .venv but pip is made. Once that is there, so is a pip (which
# here notes what it shall install).
_DEBIAN = """#!/bin/sh
if [ "$2" != venv ]; then exec {python} "$@"; fi
echo "$@" >>venv.log
shift 2
{python} -m venv --without-pip "$@" || exit 2
[ -f has-python3-venv ] || exit 1
for folder in .venv/lib/python*/site-packages; do
  mkdir "$folder/pip"
  echo 'import sys; print(*sys.argv[1:], file=open("pip.log", "a"))' >"$folder/pip/__main__.py"
done
"""


def set_up(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'tools'}:/usr/bin:/bin"}
    command = ["bash", "-o", "pipefail", "-c", ". jobs/setup-venv; setup_venv cpu"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_after_the_remedy_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "setup-venv", tmp_path / "jobs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / "tools" / "python3.11"  # the first name that is tried
    python.write_text(_DEBIAN.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    for _ in range(2):
        failed = set_up(tmp_path)
        assert failed.returncode == 1
        assert "apt-get install python3-venv" in failed.stderr
        assert (tmp_path / ".venv" / "bin" / "python").exists(), "the control: it is left half made"
    (tmp_path / "has-python3-venv").touch()
    done = set_up(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "venv.log")) == 3
    installed = [line for line in lines(tmp_path / "pip.log") if line.startswith("install")]
    assert installed[-1].endswith("-e .[cpu]")
    kept = tmp_path / ".venv" / "of a user"
    kept.touch()
    assert set_up(tmp_path).returncode == 0
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    assert set_up(tmp_path).returncode == 0
    assert kept.exists()
    assert len(lines(tmp_path / "venv.log")) == 3
    assert len([line for line in lines(tmp_path / "pip.log") if line.startswith("install")]) == len(installed) + 2


def test_an_environment_that_somebody_else_filled_is_left_alone(tmp_path: Path) -> None:
    """As `uv venv` and `uv pip install` make it: without pip."""
    (tmp_path / "jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "setup-venv", tmp_path / "jobs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    (site_packages,) = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    packages = [site_packages / f"package-{number:05d}" for number in range(20_000)]  # more than a pipe holds
    for package in packages:
        package.touch()
    refused = set_up(tmp_path)
    assert refused.returncode == 1
    assert "-m ensurepip" in refused.stderr
    assert all(package.exists() for package in packages)
