from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable, write_deltalake

from e2p_ray.config import Config, EvaluateConfig, JobConfig, ServeConfig, TrainConfig, load_config
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
    words = [str(argument) for argument in arguments]
    own = "  --dry-run  only look"
    return load_config(JobConfig, words, prog="jobs.test", description="A test.", options_help=own)


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
    objects = ("--engine", '{"drafts": false}', "--engine.max_rows", "4", "--workers", '{"max_size": 2}')
    config = load("--config", job_yaml, *objects, "--workers", '{"max_size": 3}', "--engine.max_rows", "5")
    assert (config.engine.drafts, config.engine.max_rows, config.workers.max_size) == (False, 5, 3), "the last"
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
        (["--config", "/"], "/: is a folder"),
        (["--output.uri"], "--output.uri needs a value"),
        (["--tasks.headline.sampling.seed"], "--tasks.headline.sampling.seed needs a value"),
        (["--dry-rum"], "unknown option --dry-rum; did you mean --dry-run?"),
        (["--bogus", "--engine.max_rows", "1"], "unknown option --bogus"),
        (["--engine.max_rows", "4", "--engine", '{"drafts": false}'], "--engine would replace what is given below it"),
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
        ("/x/a #1", True),
        ("/x/a?d", True),
        ("/x/[a]", True),
        ("/x/a]", True),
        ("/x/a^b", True),
        ("/x/a|b", True),
        ("/x/a\nb", True),
        ("/x/a !\"$&'()*+,-.:;<=>@_`{}~b", False),
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
        if "://" not in uri:
            assert _num_versions_seen(job_yaml.parent, uri) == 1


@pytest.mark.parametrize("name", ["a #1", "a?d"])
def test_control_such_a_table_has_no_history(name: str, tmp_path: Path) -> None:
    assert _num_versions_seen(tmp_path, name) == 0


def _num_versions_seen(folder: Path, name: str) -> int:
    """Of a Delta table of one version below a folder of this name."""
    place = str(folder / name.lstrip("/") / "table")
    write_deltalake(place, pa.table({"x": [1]}))
    return len(DeltaTable(place).history())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: [1\n", ", line 2: while parsing"),
        ("- a list\n", ": holds a list"),
        ("text\n", ": holds one value"),
        (
            "gates:\n  max_fallback_share: 1\nengine: {}\ngates:\n",
            ", line 4: the key 'gates' is there already, in line 1",
        ),
        (
            "gates: {max_fallback_share: 1, 'max_fallback_share': 2}\n",
            ", line 1: the key 'max_fallback_share' is there",
        ),
        ("tasks:\n  headline:\n    prompts:\n      no: {}\n", ", line 4: YAML takes the key no for bool"),
        ("2026-11-28: 1\n", ", line 1: YAML takes the key 2026-11-28 for timestamp"),
        ("? [a]\n: 1\n", ", line 1: a key has to be a name"),
        ("engine: \0\n", ": not YAML"),
        ("engine: !!python/name:os.system\n", ", line 1: could not determine a constructor"),
    ],
)
def test_a_broken_file_is_named_with_the_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    assert f"{path}{said}" in refused("--config", path)


def test_a_key_that_overrides_a_merged_one_is_no_repetition(job_yaml: Path) -> None:
    text = "plan: &usual {single_node_bytes: 5, num_partitions: 1}\nother: {<<: *usual, num_partitions: 2}\n"
    text = job_yaml.read_text(encoding="utf-8") + text.replace("other:", "checks: {retry: true}\nplan2:")
    job_yaml.write_text(text, encoding="utf-8")
    assert "1 problem(s)\n  plan2: unknown key; did you mean plan?" in refused("--config", job_yaml)


# -- the environment, which the jobs of one pod or shell share

TRAIN = {
    "inputs": {"users_uri": "u", "contents_uri": "c", "targets_uri": "t"},
    **{name: BASE[name] for name in ("output", "base_model", "tasks")},
}
EVALUATE = {
    "inputs": {**TRAIN["inputs"], "training_targets_uri": "t2"},
    **{name: BASE[name] for name in ("output", "base_model", "projector", "tasks")},
}
CONFIGURATIONS: list[tuple[type[Config], dict[str, Any]]] = [
    (JobConfig, BASE),
    (ServeConfig, BASE),
    (TrainConfig, TRAIN),
    (EvaluateConfig, EVALUATE),
]
TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(("model", "values"), CONFIGURATIONS)
def test_variables_of_other_jobs_are_left_alone(
    model: type[Config], values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")

    def read() -> Any:
        return load_config(model, ["--config", str(path)], prog="jobs.test", description="A test.")

    monkeypatch.setenv("E2P_API__TOKENS", json.dumps([TOKEN]))
    monkeypatch.setenv("E2P_TRAINING__NUM_STEPS", "7")
    monkeypatch.setenv("E2P_EVALUATION__SEED", "3")
    monkeypatch.setenv("E2P_COMPARE__BEFORE", "out/before")
    monkeypatch.setenv("E2P_PLAN__NUM_PARTITIONS", "4")
    monkeypatch.setenv("E2P_STORAGE__REGION", "eu-1")
    found = read()
    assert found.storage.region == "eu-1"
    if isinstance(found, ServeConfig):
        assert [token.get_secret_value() for token in found.api.tokens] == [TOKEN]
    for wrong, right in [("E2P_API__TOKNES", "E2P_API__TOKENS"), ("E2P_API_TOKENS", "E2P_API__TOKENS")]:
        monkeypatch.setenv(wrong, "[]")
        with pytest.raises(ConfigError, match=f"api.toknes: unknown key|{wrong}: unknown; did you mean {right}"):
            read()
        monkeypatch.delenv(wrong)
    monkeypatch.setenv("E2P_APY__TOKENS", "[]")
    with pytest.raises(ConfigError, match=r"1 problem\(s\)\n  E2P_APY__TOKENS: unknown; did you mean E2P_API__TOKENS"):
        read()


def test_variables_of_kubernetes_services_are_left_alone(job_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load("--config", job_yaml)
    for service in ("E2P_SERVE_SERVE_SVC", "E2P_API", "E2P"):  # of services e2p-serve-serve-svc, e2p-api and e2p
        for name, value in {
            "SERVICE_PORT": "8000",
            "SERVICE_PORT_SERVE": "8000",
            "PORT": "tcp://10.0.0.7:8000",
            "PORT_8000_TCP": "tcp://10.0.0.7:8000",
            "PORT_8000_TCP_PROTO": "tcp",
            "PORT_8000_TCP_PORT": "8000",
            "PORT_8000_TCP_ADDR": "10.0.0.7",
        }.items():
            monkeypatch.setenv(f"{service}_{name}", value)
            assert f"{service}_{name}: unknown" in refused("--config", job_yaml), (
                "the control: there is no such service"
            )
            monkeypatch.setenv(f"{service}_SERVICE_HOST", "10.0.0.7")
            assert load("--config", job_yaml) == before
            monkeypatch.delenv(f"{service}_SERVICE_HOST")
            monkeypatch.delenv(f"{service}_{name}")
    monkeypatch.setenv("E2P_OUTPUT_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("E2P_OUTPUT_URI", "s3://bucket/out")
    assert "1 problem(s)\n  E2P_OUTPUT_URI: unknown; did you mean E2P_OUTPUT__URI?" in refused("--config", job_yaml)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("E2P_API__TOKENS", "hunter2hunter2hunter2", "E2P_API__TOKENS: not JSON. Give a list"),
        ("E2P_API__TOKENS", "", "E2P_API__TOKENS: not JSON. Give a list"),
        ("E2P_API", "{hunter2", "E2P_API: not JSON. Give an object"),
        ("E2P_TASKS", "hunter2", "E2P_TASKS: not JSON. Give an object"),
        ("E2P_API__TOKENS", '"hunter2"', "api.tokens: Input should be a valid tuple (environment)"),
        ("E2P_TASKS__HEADLINE__SAMPLING__STOP", "hunter2", "SAMPLING__STOP: not JSON. Give a list"),
    ],
)
def test_a_malformed_variable_is_named_without_its_value(
    name: str, value: str, said: str, job_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config(ServeConfig, ["--config", str(job_yaml)], prog="jobs.test", description="A test.")
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert str(job_yaml) not in str(caught.value) or "(environment)" in str(caught.value)


# -- values that no job can work with

PROMPT = "tasks.headline.prompts.en"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("storage.endpoint_url", "minio:9000", "not http://HOST:PORT or https://HOST"),
        ("storage.endpoint_url", "", "not http://HOST:PORT or https://HOST"),
        ("output.uri", "gs://bucket/out", "unknown scheme 'gs': give a local path or s3://"),
        ("inputs.users_uri", "https://host/users", "unknown scheme 'https'"),
        ("output.uri", "s3://", "not s3://bucket/..."),
        ("output.uri", "s3:/bucket/out", "not s3://bucket/..."),
        ("output.uri", " s3://bucket/out", "begins or ends with a blank"),
        ("base_model.uri", "s3://bucket/model\n", "begins or ends with a blank"),
        ("base_model.uri", "file:///models/x", "unknown scheme 'file': give a local folder, s3://"),
        ("base_model.device", "gpu", "use auto, cpu or cuda"),
        ("base_model.device", "cuda:", "use auto, cpu or cuda"),
        (f"{PROMPT}.content", "{title} {text}", "{text} would not be replaced"),
        (f"{PROMPT}.content", "{ body }", "{ body } would not be replaced"),
        (f"{PROMPT}.content", "{title} by {著者}", "{著者} would not be replaced"),
        (f"{PROMPT}.content", "News", "holds neither {title} nor {body}"),
        (f"{PROMPT}.content", "", "holds neither {title} nor {body}"),
        (f"{PROMPT}.head", "About {title}", "{title} would not be replaced: only {title} and {body} in content are"),
        (f"{PROMPT}.cue_before", "For {user_name}:", "{user_name} would not be replaced"),
        (f"{PROMPT}.cue_after", "{body}", "{body} would not be replaced"),
        (f"{PROMPT}.cue_after", "For {{{user}}}", "content are; {{user}} is written as {user}"),
        (f"{PROMPT}.content", "{title} {text}", "{body} are; {{text}} is written as {text}"),
        (f"{PROMPT}.content", "{{title}}", "holds neither {title} nor {body}"),
        (f"{PROMPT}.content", "{{title}: {body}", "'{{' is closed by '}': double both braces, or neither"),
        ("tasks.headline.limits.min_chars", "201", "limits: min_chars is above max_chars (200)"),
    ],
)
def test_values_that_cannot_work_are_refused(key: str, value: str, said: str, job_yaml: Path) -> None:
    message = refused("--config", job_yaml, f"--{key}={value}")
    assert said in message
    assert "1 problem(s)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("storage.endpoint_url", "http://minio:9000"),
        ("output.uri", "s3://bucket"),
        ("output.uri", "file:///tmp/out"),
        ("output.uri", "a folder:with signs"),
        ("base_model.uri", "s3://bucket/model"),
        ("base_model.uri", "org/model"),
        ("base_model.device", "cuda:0"),
        (f"{PROMPT}.content", 'As {"title": "{title}"}, {} or { a b }'),
        (f"{PROMPT}.head", 'Answer as {"headline": "..."} or {1, 2}'),
        (f"{PROMPT}.head", '{{name}} is {"a": {"b": {}}}'),
        (f"{PROMPT}.content", "{{{title}}} for {{user}}"),
        ("tasks.headline.limits.min_chars", "200"),
    ],
)
def test_values_like_them_that_work_are_not(key: str, value: str, job_yaml: Path) -> None:
    found: Any = load("--config", job_yaml, f"--{key}={value}")
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert str(found) == value


@pytest.mark.parametrize("uri", ["/", "//", "file:///"])
def test_the_root_is_a_place(uri: str, job_yaml: Path) -> None:
    assert load("--config", job_yaml, f"--output.uri={uri}").output.uri == "/"


def test_nothing_is_said_alike_in_a_file_the_environment_and_on_the_command_line(
    job_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file = tmp_path / "null.yaml"
    given = {"workers": {"ray_address": None}, "engine": {"max_rows": None}, "storage": {"region": None}}
    in_file.write_text(yaml.safe_dump({**BASE, **given}), encoding="utf-8")
    places = [(section, name) for section, names in given.items() for name in names]
    words = [f"--{section}.{name}=null" for section, name in places]
    expected = load("--config", in_file)
    assert [getattr(getattr(expected, section), name) for section, name in places] == [None] * 3
    assert load("--config", job_yaml, *words) == expected
    for section, name in places:
        monkeypatch.setenv(f"E2P_{section}__{name}".upper(), "null")
    assert load("--config", job_yaml) == expected


def test_the_pool_is_as_large_as_its_minimum_unless_said_otherwise(job_yaml: Path) -> None:
    assert load("--config", job_yaml).workers.max_size == 1
    assert load("--config", job_yaml, "--workers.min_size", "3").workers.max_size == 3
    message = refused("--config", job_yaml, "--workers.min_size", "3", "--workers.max_size", "2")
    assert "workers: min_size is above max_size" in message


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
