from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml
from deltalake import DeltaTable

from e2p_ray.batch import BatchProgress
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import read_manifest, resolve_base_model
from e2p_ray.engine.prompt import PromptLayout, load_tokenizer
from e2p_ray.errors import ConfigError, E2PError, IncompleteRunError, PublishConflictError, StorageError
from e2p_ray.plan import read_shard
from e2p_ray.storage import Storage
from e2p_ray.train.job.board import TrainProgress
from jobs import (
    audit,
    backfill,
    evaluate,
    generate,
    history,
    plan,
    publish,
    purge,
    rollback,
    status,
    train,
    vacuum,
    validate,
    whole_run,
)
from jobs.cli import Job, guarded, run_job
from jobs.progress import ProgressLine, progress_text
from jobs.steps import planned, say, set_up
from jobs.tables import bytes_text, duration_text
from jobs.train_progress import TrainLine
from tests.s3 import S3Server
from tests.small_job import (
    NUM_BAD_CANDIDATES,
    candidates_table,
    contents_table,
    fake_engine,
    users_table,
    write_small_job,
)
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
Key = tuple[str, str, str]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("E2P_") and not name.startswith("E2P_TEST_"):
            monkeypatch.delenv(name)


def expected_keys(num_users: int = 60, num_contents: int = 6, per_user: int = 3) -> Counter[Key]:
    """What has to be published, from the inputs alone."""
    users = set(users_table(num_users)["user_id"].to_pylist())
    contents = set(contents_table(num_contents)["content_id"].to_pylist())
    table = candidates_table(num_users, num_contents, per_user)
    pairs = set(zip(table["user_id"].to_pylist(), table["content_id"].to_pylist(), strict=True))
    assert len(pairs) == num_users * per_user + NUM_BAD_CANDIDATES - 1
    return Counter(
        (user, content, task)
        for user, content in pairs
        if user in users and content in contents
        for task in ("headline", "explanation")
    )


def published(config: JobConfig) -> pa.Table:
    storage = Storage(config.storage)
    return DeltaTable(
        config.output.table_uri, storage_options=storage.delta_options(config.output.table_uri)
    ).to_pyarrow_table()


def keys_of(table: pa.Table) -> Counter[Key]:
    columns = (table[name].to_pylist() for name in ("user_id", "content_id", "task"))
    return Counter(zip(*columns, strict=True))


def texts_of(table: pa.Table) -> dict[Key, tuple[str, str]]:
    keys = zip(*(table[name].to_pylist() for name in ("user_id", "content_id", "task")), strict=True)
    return dict(zip(keys, zip(table["text"].to_pylist(), table["status"].to_pylist(), strict=True), strict=True))


def test_the_whole_way_on_a_real_s3_server(
    s3_server: S3Server, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path, place=s3_server.new_bucket(), storage=s3_server.config)
    job_file = ["--config", str(path)]
    assert run_job(validate.JOB, job_file) == 0
    assert "183" in capsys.readouterr().out
    assert run_job(plan.JOB, job_file) == 0
    shown = capsys.readouterr().out
    assert "missing_content" in shown
    assert "unknown: no run" in shown
    report = whole_run.generate_run(config, engine_factory=fake_engine, publish_it=False)
    assert report.version is None
    assert run_job(publish.JOB, job_file) == 0
    assert f"run      {report.run_id}" in capsys.readouterr().out
    table = published(config)
    assert keys_of(table) == expected_keys()
    assert set(table["run_id"].to_pylist()) == {report.run_id}
    again = whole_run.generate_run(config, engine_factory=fake_engine)
    assert again.version is not None
    assert again.version.already_published
    assert (
        "published as version 0"
        in Storage(config.storage).read_bytes(f"{config.output.uri}/runs/{report.run_id}/report.html").decode()
    )
    assert run_job(plan.JOB, job_file) == 0
    assert f"rows/s (as run {report.run_id})" in capsys.readouterr().out
    assert "hunter" not in json.dumps(again.config)
    secret = config.storage.secret_access_key
    assert secret is not None
    assert secret.get_secret_value() not in again.to_json()


def test_token_estimate_matches_what_the_engine_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = write_small_job(tmp_path)
    assert run_job(plan.JOB, ["--config", str(path), "--rows-per-s", "36"]) == 0
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "10 s at 36.0 rows/s" in shown["estimated time"]
    assert "sampled groups" in shown["prompt tokens"]
    ratio = float(shown["sharing ratio"].split()[-1])
    assert 10 < ratio < 31  # 360 requests in 12 groups, each with a token of its own
    monkeypatch.setattr(plan, "_SAMPLE_SHARDS", 20)  # all there are: nothing is left to be guessed
    setup = set_up(config)
    made = planned(config, setup)
    layout = PromptLayout(
        load_tokenizer(setup.base.path), "content_first", config.tasks, num_soft_tokens=1, max_positions=1 << 30
    )
    groups = [group for shard in made.shards for group in read_shard(setup.storage, made.uri, shard.shard_id)]
    assert len(groups) == 12
    sides = [(layout.segments(group.content, group.task), len(group.requests)) for group in groups]
    num_left = sum(len(segments.left) for segments, _ in sides)
    num_own = sum((1 + len(segments.right)) * number for segments, number in sides)
    num_alone = sum(len(segments.left) * number for segments, number in sides) + num_own
    found = plan.estimate_tokens(config, setup, made)
    assert (found.num_shared, found.num_alone) == pytest.approx((num_left + num_own, num_alone), abs=1)
    assert found.max_output == sum(180 * task.sampling.max_new_tokens for task in config.tasks.values())
    soft_first = replace(setup, manifest=replace(setup.manifest, layout="soft_first", num_soft_tokens=2))
    found = plan.estimate_tokens(config, soft_first, made)
    assert (found.num_shared, found.num_alone) == pytest.approx((num_alone + 360, num_alone + 360), abs=1)


def test_the_speed_that_is_expected_is_that_of_the_last_run_which_wrote_anything(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path)
    setup = set_up(config)
    assert plan.last_rows_per_s(config, setup) == (None, "")
    for run_id, day, rows_per_s in (("a", 2, 9.0), ("b", 3, 5.0), ("c", 1, 7.0), ("d", 4, 0.0), ("e", 5, None)):
        report = {"run_id": run_id, "finished_at": f"2026-11-0{day}T00:00:00+00:00", "rows_per_s": rows_per_s}
        setup.storage.write_bytes(f"{config.output.uri}/runs/{run_id}/report.json", json.dumps(report).encode())
    assert plan.last_rows_per_s(config, setup) == (5.0, "as run b")


def test_relative_places_are_the_jobs_whatever_folder_its_workers_have(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers are where their Ray was started
    assert ray.get(ray.remote(lambda: os.getcwd()).remote()) != os.getcwd(), "the control"
    planned_by_ray = {"requests_per_shard": 40, "single_node_bytes": 0, "num_partitions": 2}
    config, _ = write_small_job(Path("job"), plan=planned_by_ray)
    assert config.output.uri == "job/out"
    report = whole_run.generate_run(config, engine_factory=fake_engine)
    assert keys_of(published(config)) == expected_keys()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    Path("job").rename(moved / "job")
    monkeypatch.chdir(moved)
    again = whole_run.generate_run(config, engine_factory=fake_engine)
    assert again.version is not None
    assert again.version.already_published, "the plan and the run have the same names in a folder that was moved"
    assert again.run_id == report.run_id
    assert len(list(Path("job/out/plans").iterdir())) == 1


def test_gates_close_after_the_report_is_written(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path, gates={"max_fallback_share": 0.01})
    job = replace(generate.JOB, call=lambda c, _: print(whole_run.generate_run(c, engine_factory=fake_engine)))
    assert run_job(job, ["--config", str(path)]) == 4
    said = capsys.readouterr().err
    assert "max_fallback_share" in said
    place = said.split("The report: ")[1].strip()
    assert "not published" in Path(place).read_text(encoding="utf-8")
    assert not Path(config.output.table_uri, "_delta_log").exists()
    assert run_job(publish.JOB, ["--config", str(path)]) == 4
    opened = ["--config", str(path), "--gates.max_fallback_share", "1"]
    assert run_job(publish.JOB, [*opened, "--run", ""]) == 2, "not another run than was asked for"
    assert run_job(publish.JOB, opened) == 0
    assert keys_of(published(config)) == expected_keys()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"engine": {"max_row": 3}}, 2, "engine.max_row: unknown key; did you mean max_rows?"),
        ({"projector": {"uri": "nowhere"}}, 2, "no projector artifact here"),
        ({"base_model": {"uri": "other"}}, 3, "was trained for base model"),
        ({"inputs": {"users_uri": "nowhere.parquet"}}, 3, "nowhere.parquet: no Parquet file here"),
        ({"inputs": {"users_uri": "contents"}}, 3, "column 'user_id'"),
    ],
)
def test_what_is_wrong_is_said_with_its_exit_code(
    change: dict[str, dict[str, object]], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = write_small_job(tmp_path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, keys in change.items():
        values.setdefault(section, {}).update(keys)
    if values["inputs"]["users_uri"] == "contents":
        values["inputs"]["users_uri"] = values["inputs"]["contents_uri"]
    if values["base_model"]["uri"] == "other":
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text("{}", encoding="utf-8")
        values["base_model"]["uri"] = str(other)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert run_job(validate.JOB, ["--config", str(path)]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", ""),
        ("cut", "model.safetensors: not the file that config.json names"),
        ("removed", "model.safetensors: is not there. Copy the artifact again"),
        ("unnamed", "model.safetensors: not the file that config.json names"),
        ("narrower base", "makes soft tokens of width 4, the base model's tokens have 2"),
    ],
)
def test_the_projector_s_files_and_width_are_looked_at(
    change: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path)
    storage, folder = Storage(), Path(config.projector.uri)
    width = 2 if change == "narrower base" else 4
    (tmp_path / "base" / "config.json").write_text(json.dumps({"hidden_size": width}), encoding="utf-8")
    weights, base_model_id = folder / "model.safetensors", resolve_base_model(config.base_model, storage).base_model_id
    manifest = replace(read_manifest(storage, config.projector.uri), base_model_id=base_model_id)
    manifest = manifest.with_files({} if change == "unnamed" else manifest.files)
    (folder / "config.json").write_text(manifest.to_json(), encoding="utf-8")
    if change == "cut":
        weights.write_bytes(b"weight")
    elif change == "removed":
        weights.unlink()
    assert run_job(validate.JOB, ["--config", str(path)]) == (3 if said else 0)
    shown = capsys.readouterr()
    assert said in shown.err
    assert ("everything fits together" in shown.out) == (not said)


def test_the_place_of_the_output_is_looked_at(
    s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = write_small_job(tmp_path, place=s3_server.new_bucket(), storage=s3_server.config)
    job = ["--config", str(path)]
    assert run_job(validate.JOB, [*job, "--output.uri", str(tmp_path / "new" / "out")]) == 0
    assert not (tmp_path / "new").exists(), "nothing is written"
    assert run_job(validate.JOB, [*job, "--output.uri", "s3://nobody-made-this-bucket/out"]) == 5
    assert "nobody-made-this-bucket" in capsys.readouterr().err
    assert run_job(validate.JOB, [*job, "--output.uri", f"{path}/out"]) == 2
    assert f"{path} is no folder" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_said_by_every_job_that_only_reads(
    s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = write_small_job(tmp_path, place=s3_server.new_bucket(), storage=s3_server.config)
    words = ["--config", str(path), "--output.uri", "s3://nobody-made-this-bucket/out"]
    users = tmp_path / "users.txt"
    users.write_text("user-0001\n")
    asked: list[tuple[Job[JobConfig], list[str]]] = [
        (history.JOB, []),
        (vacuum.JOB, []),
        (audit.JOB, []),
        (status.JOB, []),
        (publish.JOB, []),
        (rollback.JOB, ["--version", "0"]),
        (purge.JOB, ["--users", str(users)]),
    ]
    for job, more in asked:
        assert run_job(job, [*words, *more]) == 5, job.prog
        said = rf"{job.prog}: there is no bucket for s3://nobody-made-this-bucket/out\S*\. Make it, or correct .*\n"
        assert re.fullmatch(said, capsys.readouterr().err), job.prog


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "run the same command again"),
        (StorageError("s3 is away"), 5, "jobs.x: s3 is away"),
        (IncompleteRunError("3 left"), 5, "3 left"),
        (PublishConflictError("another"), 4, "another"),
        (E2PError("something"), 1, "something"),
        (ZeroDivisionError("division"), 1, "unexpected ZeroDivisionError: division\nSet E2P_DEBUG=1"),
    ],
)
def test_every_error_has_one_message_and_its_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        raise error

    assert guarded(call, "jobs.x") == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("E2P_DEBUG", "1")
    guarded(call, "jobs.x")
    assert isinstance(error, KeyboardInterrupt) or "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "job", [validate.JOB, plan.JOB, generate.JOB, backfill.JOB, publish.JOB, train.JOB, evaluate.JOB]
)
def test_help_says_what_a_job_does(job: Job[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_job(job, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m {job.prog} --config FILE" in shown
    assert job.description in shown
    own = {
        "jobs.plan": "--rows-per-s",
        "jobs.generate": "--full",
        "jobs.backfill": "--projector URI",
        "jobs.publish": "--run RUN_ID",
        "jobs.train": "--training.num_steps",
        "jobs.evaluate": "--evaluation.methods",
    }
    assert own.get(job.prog, "--workers.max_size") in shown


def test_publish_without_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = write_small_job(tmp_path)
    assert run_job(publish.JOB, ["--config", str(path)]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert run_job(publish.JOB, ["--config", str(path), "--run", "nope"]) == 2


# -- words on the terminal


def _progress(**changes: object) -> BatchProgress:
    values = BatchProgress(
        num_shards=10,
        num_done=5,
        num_done_here=4,
        num_requests=400,
        num_output_tokens=8_000,
        num_failures=0,
        attempt=1,
        generating_s=8.0,
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def test_progress_says_what_is_left() -> None:
    text = progress_text(_progress(), 15.0)
    assert text == ("[##########..........] 5/10 shards, 400 rows, 50.0 rows/s, 1,000 tokens/s, 10 s left, 15 s so far")
    assert "starting" in progress_text(_progress(num_done=0, num_done_here=0, num_requests=0), 3.0)
    assert "waiting: no node" in progress_text(_progress(num_requests=0, waits_for="no node"), 3.0)
    assert "2 failed tries, attempt 2" in progress_text(_progress(num_failures=2, attempt=2), 3.0)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_line_rewrites_itself_on_a_terminal_only(terminal: bool) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    with ProgressLine(stream) as line:
        line(_progress())
    assert ("\r" in stream.getvalue()) is terminal
    assert stream.getvalue().endswith("so far\n")


@pytest.mark.parametrize(("nothing_new_s", "at_least"), [(0.0, 3), (60.0, 1)])
def test_a_plain_line_comes_again_after_a_while(
    nothing_new_s: float, at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.progress._PLAIN_S", 0.01)
    monkeypatch.setattr("jobs.progress._NOTHING_NEW_S", nothing_new_s)
    stream = io.StringIO()

    def num_lines() -> int:
        return stream.getvalue().count("\n")

    with ProgressLine(stream) as line:
        line(_progress())
        wait_until(lambda: num_lines() >= at_least, "a line")
        time.sleep(0.1)  # ten more looks
        assert nothing_new_s == 0.0 or num_lines() == 1, "control: not before the while is over"


def test_a_progress_that_nobody_reads_any_more_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `python -m jobs.generate 2>&1 | head`: a pipe whose reader has left."""

    def fail() -> None:
        raise ConfigError("a fault of the configuration")

    def interrupt() -> None:
        raise KeyboardInterrupt

    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w", buffering=1)
    with closing(stream):
        with pytest.raises(BrokenPipeError):
            print("the control", file=stream)
        with ProgressLine(stream) as line:
            line(_progress())
        with TrainLine(stream) as training:
            training(TrainProgress(200, 1, 0))
            training.say("a line")
        monkeypatch.setattr("sys.stderr", stream)
        say("a line")
        assert guarded(fail, "jobs.generate") == ConfigError.exit_code
        assert guarded(interrupt, "jobs.generate") == 130
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still in its buffer


def test_figures_are_readable() -> None:
    assert [duration_text(s) for s in (3.4, 75, 3_720)] == ["3 s", "1 min 15 s", "1 h 02 min"]
    assert [bytes_text(n) for n in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]


_END = """
import atexit, sys, threading, time
from jobs.cli import end
atexit.register(print, "registered")
if sys.argv[2:]:
    threading.Thread(target=lambda: (time.sleep(0.3), print("waited for"))).start()
print("said")
end(int(sys.argv[1]))
"""


def test_a_process_ends_with_its_code_when_all_is_said_and_done() -> None:
    for words, said in ((["3"], "said\nregistered\n"), (["0", "thread"], "said\nwaited for\nregistered\n")):
        ended = subprocess.run([sys.executable, "-c", _END, *words], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (int(words[0]), said, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is full")
@pytest.mark.parametrize(("code", "ends_with"), [(0, 1), (3, 3)])
def test_what_could_not_be_printed_is_no_success(code: int, ends_with: int) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", _END, str(code)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == ends_with
    assert "not whole: [Errno 28]" in ended.stderr
