from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2p_ray.config import JobConfig, load_config
from e2p_ray.config.options import describe, keys
from e2p_ray.errors import ConfigError

BASE: dict[str, Any] = {
    "inputs": {"users_uri": "in/users/", "contents_uri": "in/contents", "candidates_uri": "in/candidates"},
    "output": {"uri": "out/"},
    "base_model": {"uri": "model"},
    "projector": {"uri": "projector"},
    "tasks": {"headline": {"prompts": {"en": {"cue_before": "Headline:"}}, "sampling": {"seed": 1}}},
    "engine": {"max_rows": 11},
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("E2P_"):
            monkeypatch.delenv(name)


@pytest.fixture
def job_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return path


def load(*arguments: object) -> JobConfig:
    return load_config(JobConfig, [str(argument) for argument in arguments], prog="jobs.test", description="A test.")


def refused(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value)


def test_later_sources_win(job_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("--config", job_yaml).engine.max_rows == 11
    monkeypatch.setenv("E2P_ENGINE__MAX_ROWS", "22")
    monkeypatch.setenv("E2P_GATES__MAX_FALLBACK_SHARE", "0.25")
    config = load("--config", job_yaml)
    assert (config.engine.max_rows, config.gates.max_fallback_share) == (22, 0.25)
    config = load("--config", job_yaml, "--engine.max_rows", "33", "--checks.retry=false")
    assert (config.engine.max_rows, config.gates.max_fallback_share, config.checks.retry) == (33, 0.25, False)


def test_one_key_of_a_task_is_set_without_the_others(job_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2P_TASKS__HEADLINE__SAMPLING__SEED", "7")
    sampling = "--tasks.headline.sampling."
    config = load("--config", job_yaml, f"{sampling}top_p", "0.5", f"{sampling}stop", '["。", "\\n"]')
    task = config.tasks["headline"]
    assert (task.sampling.seed, task.sampling.top_p, task.sampling.stop) == (7, 0.5, ("。", "\n"))
    assert task.prompts["en"].cue_before == "Headline:"
    config = load("--config", job_yaml, "--tasks.summary.prompts.ja.cue_before", "要約：")
    assert set(config.tasks) == {"headline", "summary"}


@pytest.mark.parametrize(
    "path",
    [
        ("bogus",),
        ("inputs", "bogus"),
        ("storage", "bogus"),
        ("tasks", "headline", "bogus"),
        ("tasks", "headline", "sampling", "bogus"),
        ("tasks", "headline", "prompts", "en", "bogus"),
    ],
)
@pytest.mark.parametrize("source", ["file", "environment", "command line"])
def test_an_unknown_key_is_named_at_every_level(
    path: tuple[str, ...], source: str, job_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[object] = ["--config", job_yaml]
    if source == "file":
        values = json.loads(json.dumps(BASE))
        place = values
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = 1
        job_yaml.write_text(yaml.safe_dump(values), encoding="utf-8")
    elif source == "environment":
        monkeypatch.setenv("E2P_" + "__".join(path).upper(), "1")
    else:
        arguments += [f"--{'.'.join(path)}", "1"]
    message = refused(*arguments)
    name = "E2P_BOGUS" if source == "environment" and len(path) == 1 else ".".join(path)
    assert name in message
    assert "unknown" in message
    assert source == "file" or source in message


def test_every_problem_is_said_at_once_with_the_file(job_yaml: Path) -> None:
    message = refused(
        "--config", job_yaml, "--engine.max_row", "1", "--workers.min_size", "x", "--gates.max_fallback_share", "2"
    )
    assert str(job_yaml) in message
    assert "3 problem(s)" in message
    assert "engine.max_row: unknown key; did you mean max_rows? (command line)" in message
    assert "workers.min_size" in message
    assert "gates.max_fallback_share" in message


def test_a_near_miss_in_the_environment_is_not_ignored(job_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2P_ENGINE_MAX_ROWS", "1")
    assert "E2P_ENGINE_MAX_ROWS: unknown; did you mean E2P_ENGINE__MAX_ROWS?" in refused("--config", job_yaml)
    monkeypatch.delenv("E2P_ENGINE_MAX_ROWS")
    monkeypatch.setenv("E2P_DEBUG", "1")
    load("--config", job_yaml)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "/nowhere/job.yaml"], "/nowhere/job.yaml: no such file"),
        (["job.yaml"], "'job.yaml' is not an option"),
        (["--output.uri"], "--output.uri needs a value"),
        ([], "no --config FILE given"),
    ],
)
def test_wrong_words_are_explained(arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    ("uri", "is_refused"),
    [
        ("/x/100%20x", True),
        ("/x/%e3%81%82", True),
        ("/x/a\\b", True),
        ("file:///x/100%20x", True),
        ("s3://bucket/a%20b", True),
        ("s3://bucket/a?b", True),
        ("s3://bucket/a#b", True),
        ("/x/a b#c?d", False),
        ("/x/100%", False),
        ("/x/日本", False),
        ("s3://bucket/a b/日本%", False),
    ],
)
def test_an_output_that_delta_would_look_for_elsewhere_is_refused(uri: str, is_refused: bool, job_yaml: Path) -> None:
    if is_refused:
        assert "Delta Lake would look elsewhere" in refused("--config", job_yaml, "--output.uri", uri)
    else:
        assert load("--config", job_yaml, "--output.uri", uri).output.uri == uri


def test_broken_yaml_names_the_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("engine: [1\n", encoding="utf-8")
    message = refused("--config", path)
    assert str(path) in message
    assert "line" in message
    path.write_text("- a list\n", encoding="utf-8")
    assert str(path) in refused("--config", path)


def test_secrets_are_nowhere_to_be_read(job_yaml: Path) -> None:
    config = load("--config", job_yaml, "--storage.secret_access_key", "hunter2", "--storage.access_key_id", "hunter1")
    assert config.storage.secret_access_key is not None
    assert config.storage.secret_access_key.get_secret_value() == "hunter2"
    assert "hunter" not in json.dumps(config.resolved()) + repr(config) + str(config)
    assert "hunter" not in refused("--config", job_yaml, "--storage.secret_access_key", '["hunter2"]')
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301 - our own bytes
    assert copy.storage.secret_access_key.get_secret_value() == "hunter2"


def test_resolved_configuration_is_whole_and_loads_again(job_yaml: Path, tmp_path: Path) -> None:
    config = load("--config", job_yaml, "--engine.max_rows", "5")
    assert config.output.uri == "out"
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.resolved()), encoding="utf-8")
    assert load("--config", again) == config


def test_text_hash_follows_what_decides_the_texts(job_yaml: Path) -> None:
    config = load("--config", job_yaml)
    same = load("--config", job_yaml, "--workers.max_size", "4", "--output.uri", "elsewhere")
    other = load("--config", job_yaml, "--tasks.headline.sampling.seed", "2")
    assert config.text_hash() == same.text_hash() != other.text_hash()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "A test." in shown
    assert all(f"--{'.'.join(path)} " in shown for path, _ in keys(JobConfig))
    assert "max_new_tokens" in describe(JobConfig)


def test_reading_a_configuration_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, e2p_ray.config; print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
