"""What generator actors count and log: names, labels, the dashboard, and real figures out of a real Ray."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from e2p_ray.batch import ShardWorker, run_batch
from e2p_ray.batch.metrics import METRICS
from e2p_ray.commit import Run, open_run, verify
from e2p_ray.config import JobConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.plan import make_plan
from e2p_ray.storage import Storage
from tests.small_job import DIM, SPACE, fake_engine, write_small_job

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = "ray_"  # what Ray puts before every name


def opened(folder: Path, run_id: str, **changes: object) -> tuple[JobConfig, Storage, Run]:
    config, _ = write_small_job(folder, **changes)  # type: ignore[arg-type]
    storage = Storage(config.storage)
    plan = make_plan(config, storage, embedding_space=SPACE, embedding_dim=DIM)
    engine = fake_engine(config, storage)
    ids = (SPACE, engine.projector_id, engine.base_model_id, tuple(shard.shard_id for shard in plan.shards))
    run = Run(run_id, f"{config.output.uri}/runs/{run_id}", config.output.table_uri, plan.uri, *ids)
    open_run(storage, run, config.resolved())
    return config, storage, run


# The dashboard


def expressions(dashboard: object) -> Iterator[str]:
    if isinstance(dashboard, dict):
        for name, value in dashboard.items():
            if name == "expr":
                yield value
            yield from expressions(value)
    elif isinstance(dashboard, list):
        for value in dashboard:
            yield from expressions(value)


def dashboard_problems(queries: list[str]) -> list[str]:
    """Metrics and labels that a dashboard asks for and nobody emits, and metrics that it does not show."""
    labels = {EXPORTED + metric.name: set(metric.labels) for metric in METRICS}
    asked = {name for query in queries for name in re.findall(r"\b(?:ray_)?e2p_\w+", query)}
    problems = [f"unknown {name}" for name in sorted(asked - labels.keys())]
    problems += [f"not shown: {name}" for name in sorted(labels.keys() - asked)]
    for query in queries:
        emitted = set().union(*(labels.get(name, set()) for name in re.findall(r"ray_e2p_\w+", query)))
        used = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
        used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", query))
        problems += [f"no label {label} in {query}" for label in sorted(used - emitted)]
    return problems


def dashboard() -> dict[str, object]:
    found: dict[str, object] = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return found


def test_the_dashboard_asks_for_what_is_emitted_and_shows_all_of_it() -> None:
    queries = list(expressions(dashboard()))
    assert len(queries) >= 8
    assert not dashboard_problems(queries)


def test_the_dashboard_shows_the_labels_that_its_legends_name() -> None:
    panels = dashboard()["panels"]
    assert isinstance(panels, list)
    for panel in panels:
        for target in panel["targets"]:
            grouped = {name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == grouped, panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("e2p_shards_total", "e2p_shard_total", "unknown ray_e2p_shard_total"),
        ("ray_e2p_shards_total", "e2p_shards_total", "unknown e2p_shards_total"),
        ("(outcome)", "(user_id)", "no label user_id"),
        ('status!="ok"', 'verdict!="ok"', "no label verdict"),
        ("ray_e2p_draft_tokens_total", "ray_e2p_output_tokens_total", "not shown: ray_e2p_draft_tokens_total"),
    ],
)
def test_control_a_dashboard_that_does_not_fit_is_found(old: str, new: str, problem: str) -> None:
    queries = [query.replace(old, new) for query in expressions(dashboard())]
    assert any(problem in found for found in dashboard_problems(queries))


def test_names_are_counters_in_base_units_and_labels_name_nobody() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"e2p(_[a-z]+)+_total", metric.name)
        assert not re.search(r"_(ms|minutes|kib|mib|kb)_", metric.name)
        assert set(metric.labels) <= {"task", "status", "reason", "code", "outcome"}
    assert len({metric.name for metric in METRICS}) == len(METRICS)


# Out of a real Ray


Samples = dict[str, dict[tuple[str, ...], float]]


def exported() -> Samples:
    """Our samples as Prometheus would read them now, by metric and the values of our labels, summed over actors."""
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        text = answer.read().decode()
    found: Samples = {metric.name: {} for metric in METRICS}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (name := sample.name.removeprefix(EXPORTED)) in found:
                (metric,) = (one for one in METRICS if one.name == name)
                labels = tuple(sample.labels[label] for label in metric.labels)
                found[name][labels] = found[name].get(labels, 0.0) + sample.value
    return found


def grown(before: Samples, after: Samples) -> Samples:
    return {
        name: {labels: more for labels, value in rows.items() if (more := value - before[name].get(labels, 0.0))}
        for name, rows in after.items()
    }


def failing_once(config: JobConfig, storage: Storage) -> FakeEngine:
    """An engine whose first call in this run fails."""
    engine, mark = fake_engine(config, storage), Path(config.output.uri) / "failed-once"
    generate = engine.generate

    def generating(*words: object, **names: object) -> object:
        if not mark.exists():
            mark.touch()
            raise ValueError("once")
        return generate(*words, **names)  # type: ignore[arg-type]

    engine.generate = generating  # type: ignore[method-assign, assignment]
    return engine


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_run_is_counted_as_the_summary_and_the_rows_say(tmp_path: Path) -> None:
    tasks = {"headline": {"prompts": {"en": {"cue_before": "\nHeadline:"}}}}  # Japanese contents: dead letters
    config, storage, run = opened(tmp_path, "run-counted", tasks=tasks, workers={"max_shard_attempts": 2})
    before = exported()
    summary = run_batch(config, storage, run, engine_factory=failing_once)
    checked = verify(storage, run)
    want = {("done",): float(summary.num_done), ("failed",): 1.0}
    for _ in range(300):  # Ray's workers report every ten seconds
        found = grown(before, exported())
        if found["e2p_shards_total"] == want:
            break
        time.sleep(0.2)
    assert found["e2p_shards_total"] == want
    by_status: dict[str, float] = {}
    for (task, status, _), number in found["e2p_rows_total"].items():
        assert task == "headline"
        by_status[status] = by_status.get(status, 0.0) + number
    assert by_status == {status: number for status, number in checked.statuses.items() if number}
    assert by_status["ok"] > 0
    letters = {code: number for (_, code), number in found["e2p_dead_letters_total"].items()}
    assert letters == {"no_prompt": summary.num_dead_letters}
    assert letters["no_prompt"] > 0
    for name, number in {
        "e2p_prompt_tokens_total": summary.num_prompt_tokens,
        "e2p_computed_tokens_total": summary.num_computed_tokens,
        "e2p_output_tokens_total": summary.num_output_tokens,
    }.items():
        assert found[name] == {(): number}
    assert found["e2p_generating_seconds_total"][()] > 0
    assert not found["e2p_draft_tokens_total"]  # no request had a draft
    assert found["e2p_workers_total"] == {("ready",): 2.0}  # one a pass: a failed shard is tried again by another pass
    assert 0 < found["e2p_loading_seconds_total"][()] < found["e2p_workers_total"][("ready",)] * 60


# Logs


def lines_of(capture: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in io.StringIO(capture) if line.startswith("{")]


def test_a_worker_logs_one_line_a_shard_with_its_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, storage, run = opened(tmp_path, "run-logged")
    worker = ShardWorker(config, storage, run, fake_engine)
    worker(pa.table({"shard_id": [run.shard_ids[0]]}))
    worker(pa.table({"shard_id": ["nowhere"]}))
    said = capfd.readouterr().err
    ready, done, failed = lines_of(said)
    assert [line["event"] for line in (ready, done, failed)] == ["worker_ready", "shard_done", "shard_failed"]
    assert {line["run_id"] for line in (ready, done, failed)} == {"run-logged"}
    assert (done["shard_id"], failed["shard_id"]) == (run.shard_ids[0], "nowhere")
    assert (done["level"], failed["level"]) == ("info", "error")
    assert isinstance(done["num_requests"], int)
    assert done["num_requests"] > 0
    assert "nowhere" in str(failed["message"])
    # No user, no content, no text: the inputs hold these words in every row.
    for word in ("user-0", "content-0", "Harbour", "bridge", "橋"):
        assert word not in said


def test_control_logs_can_be_switched_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, storage, run = opened(tmp_path, "run-silent", workers={"log_shards": False})
    worker = ShardWorker(config, storage, run, fake_engine)
    worker(pa.table({"shard_id": [run.shard_ids[0]]}))
    assert not lines_of(capfd.readouterr().err)
