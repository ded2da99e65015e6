"""The cluster's files: what is rendered fits the operator, and every command in it is one that exists and parses."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from click import Command, UsageError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray.serve.schema import ServeDeploySchema

from e2p_ray.config import JobConfig, TrainConfig, load_config
from e2p_ray.errors import ConfigError
from jobs.cluster import main
from jobs.cluster_files import KINDS, Kind, entrypoint, render
from jobs.cluster_settings import SETTINGS, load_settings
from tests.kube_schema import autoscaler_schema, problems, published_schemas

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

JOB = {
    "inputs": {f"{name}_uri": f"s3://bucket/in/{name}" for name in ("users", "contents", "candidates")},
    "output": {"uri": "s3://bucket/out"},
    "base_model": {"uri": "s3://bucket/model"},
    "projector": {"uri": "s3://bucket/projector"},
    "tasks": {"headline": {"prompts": {"ja": {"cue_before": "\n見出し："}}}},
    "workers": {"num_cpus": 99},  # the settings of the cluster win
}
TRAIN = {
    "inputs": {f"{name}_uri": f"s3://bucket/in/{name}" for name in ("users", "contents", "targets")},
    "output": {"uri": "s3://bucket/training"},
    "base_model": {"uri": "s3://bucket/model"},
    "tasks": JOB["tasks"],
}
SERVE = {**JOB, "api": {"rate_per_s": 10}}
JOBS: tuple[Kind, ...] = ("generate", "train", "schedule", "raycronjob")
KUBERNETES: tuple[Kind, ...] = (*JOBS, "serve")
AMI = ("--aws.ami", "ami-0123456789abcdef0")


@pytest.fixture
def configs(tmp_path: Path) -> dict[Kind, Path]:
    """The job's configuration by kind."""
    found: dict[Kind, Path] = {}
    for kind in KUBERNETES:
        found[kind] = tmp_path / f"{kind}.yaml"
        text = yaml.safe_dump({"train": TRAIN, "serve": SERVE}.get(kind, JOB), allow_unicode=True)
        found[kind].write_text(text, encoding="utf-8")
    return found


def rendered(kind: Kind, configs: dict[Kind, Path], *words: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(kind, load_settings(SETTINGS, words), configs.get(kind))))


def with_hidden(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The manifests, and those that a ConfigMap keeps for the schedule."""
    for document in documents:
        yield document
        if document["kind"] == "ConfigMap" and "rayjob.yaml" in document["data"]:
            yield yaml.safe_load(document["data"]["rayjob.yaml"])


def ray_job_spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one["spec"] for one in with_hidden(documents) if one["kind"] in ("RayJob", "RayCronJob")]
    spec: dict[str, Any] = found[0].get("jobTemplate", found[0])
    return spec


# Fields


SIZES = [
    (),
    ("--generate_workers.gpus", "0", "--generate_workers.spot", "false", "--plan_workers.max_nodes", "1"),
    ("--generate_workers.gpus", "8", "--generate_workers.cpus", "96", "--spot_taint", "example.com/spot"),
    ("--namespace", "123", "--service_account", "4", "--secret", "5"),  # names that YAML could take for numbers
]


@pytest.mark.parametrize("kind", KUBERNETES)
@pytest.mark.parametrize("words", SIZES)
def test_manifests_hold_fields_that_exist(kind: Kind, words: tuple[str, ...], configs: dict[Kind, Path]) -> None:
    documents = list(with_hidden(rendered(kind, configs, *words)))
    assert [found for document in documents for found in problems(document)] == []
    assert {"RayJob", "RayCronJob", "RayService"} & {document["kind"] for document in documents}


@pytest.mark.parametrize("kind", KUBERNETES)
@pytest.mark.parametrize("words", SIZES)
def test_manifests_fit_the_schemas_that_the_operator_publishes(
    kind: Kind, words: tuple[str, ...], configs: dict[Kind, Path]
) -> None:
    schemas = published_schemas()
    if not schemas:
        pytest.skip("E2P_TEST_KUBERAY_CRDS names no folder with the operator's ray.io_*.yaml")
    documents = [one for one in with_hidden(rendered(kind, configs, *words)) if one["apiVersion"] == "ray.io/v1"]
    assert documents
    assert [found for document in documents for found in problems(document, schemas)] == []


def test_control_a_field_that_does_not_exist_is_found(configs: dict[Kind, Path]) -> None:
    (good,) = [document for document in rendered("generate", configs) if document["kind"] == "RayJob"]
    bad = copy.deepcopy(good)
    bad["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    assert any("comand" in found for found in problems(bad))
    bad = copy.deepcopy(good)
    bad["spec"]["backoffLimit"] = "2"
    assert problems(bad)
    bad = copy.deepcopy(good)
    del bad["spec"]["rayClusterSpec"]["authOptions"]
    assert problems(bad)
    for schema in [schemas] if (schemas := published_schemas()) else []:
        bad["spec"]["rayClusterSpec"]["authOptions"] = {"mode": "tokens"}
        assert problems(bad, schema)


def operator_problems(spec: dict[str, Any], name: str) -> list[str]:
    """Rules of the operator that are in no schema: it refuses such a RayJob when it sees it."""
    cluster, found = spec["rayClusterSpec"], []
    if len(name) > 47:
        found.append("a RayJob's name has 47 characters at most")
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if cluster["authOptions"]["mode"] != "token":
        found.append("no token")
    if Version(cluster["rayVersion"]) < Version("2.52.0"):
        found.append("tokens need Ray 2.52")
    pods = [cluster["headGroupSpec"]["template"]["spec"]]
    for group in cluster["workerGroupSpecs"]:
        pods.append(group["template"]["spec"])
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"replicas of {group['groupName']}")
    if cluster["autoscalerOptions"]["version"] == "v2" and any("restartPolicy" in pod for pod in pods):
        found.append("the autoscaler v2 wants restartPolicy Never or none")
    return found


@pytest.mark.parametrize("kind", JOBS)
def test_the_operator_would_take_them(kind: Kind, configs: dict[Kind, Path]) -> None:
    documents = rendered(kind, configs, "--name", "n" * 27)
    spec = ray_job_spec(documents)
    names = [one["metadata"]["name"] for one in with_hidden(documents) if one["kind"] in ("RayJob", "RayCronJob")]
    assert not operator_problems(spec, names[0])
    assert all(len(name) <= (36 if kind == "raycronjob" else 47) for name in names)
    assert f"ray[data,serve,train]=={spec['rayClusterSpec']['rayVersion']}" in PROJECT["dependencies"]


def test_control_what_the_operator_refuses_is_found(configs: dict[Kind, Path]) -> None:
    spec = ray_job_spec(rendered("generate", configs))
    cluster = spec["rayClusterSpec"]
    spec["shutdownAfterJobFinishes"] = False
    cluster["rayVersion"], cluster["authOptions"]["mode"] = "2.9.0", "disabled"
    cluster["workerGroupSpecs"][0]["replicas"] = 1000
    cluster["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"
    assert len(operator_problems(spec, "n" * 48)) == 6


# Commands


def parsed_entrypoint(documents: list[dict[str, Any]], folder: Path) -> JobConfig | TrainConfig:
    """The configuration that the entry point's command gives on the head pod, whose ConfigMap is a folder here."""
    spec = ray_job_spec(documents)
    (config_map,) = [document for document in documents if document["kind"] == "ConfigMap"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = head["volumes"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    (mount,) = [one for one in head["containers"][0]["volumeMounts"] if one["name"] == volume["name"]]
    mounted = folder / "mounted"
    mounted.mkdir()
    for name, text in config_map["data"].items():
        (mounted / name).write_text(text, encoding="utf-8")
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    options = [word.replace(mount["mountPath"], str(mounted)) for word in words[3:]]
    config: JobConfig | TrainConfig = load_config(module.JOB.config, options, prog=module.JOB.prog, description="")
    return config


@pytest.mark.parametrize("kind", JOBS)
def test_entry_points_parse_and_fit_the_pods(kind: Kind, configs: dict[Kind, Path], tmp_path: Path) -> None:
    documents = rendered(kind, configs)
    config = parsed_entrypoint(documents, tmp_path)
    group = ray_job_spec(documents)["rayClusterSpec"]["workerGroupSpecs"][-1]
    resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    workers = config.workers
    assert (workers.num_cpus, workers.num_gpus) == (resources["cpu"], resources["nvidia.com/gpu"])
    size = config.workers.num_workers if isinstance(config, TrainConfig) else config.workers.max_size
    assert size == group["maxReplicas"]
    assert config.tasks["headline"].prompts["ja"].cue_before == "\n見出し："


@pytest.mark.parametrize(
    ("gpus", "cpus", "actor_gpus", "actor_cpus", "num_actors"), [(0, 8, 0, 8, 6), (1, 8, 1, 8, 6), (4, 48, 1, 12, 24)]
)
def test_actors_fill_their_nodes(gpus: int, cpus: int, actor_gpus: int, actor_cpus: int, num_actors: int) -> None:
    sizes = {"gpus": gpus, "cpus": cpus, "max_nodes": 6}
    words = [word for name, value in sizes.items() for word in (f"--generate_workers.{name}", str(value))]
    command = entrypoint(load_settings(SETTINGS, words), "generate", "job.yaml")
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--workers.num_gpus"] == str(actor_gpus)
    assert options["--workers.num_cpus"] == str(actor_cpus)
    assert options["--workers.max_size"] == str(num_actors)
    command = entrypoint(load_settings(SETTINGS, words), "train", "train.yaml")
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--workers.num_gpus"] == str(actor_gpus)
    assert options["--workers.num_cpus"] == str(actor_cpus)
    assert options["--workers.num_workers"] == str(num_actors)


def test_a_service_builds_what_the_settings_say(configs: dict[Kind, Path], tmp_path: Path) -> None:
    """The import path and arguments of the Serve config, called with the ConfigMap as a folder here."""
    config_map, service = rendered("serve", configs, "--serve_workers.gpus", "0", "--serve_workers.max_nodes", "3")
    assert not service["metadata"]["name"].endswith("-svc")
    assert len(service["metadata"]["name"]) + len("-serve-svc") <= 63
    deploy = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = deploy.applications
    module, _, function = application.import_path.partition(":")
    cluster = service["spec"]["rayClusterConfig"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:  # any of them may build the application
        assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert application.args["config"] == f"{mount['mountPath']}/serve.yaml"
        ports = {one["name"]: one["containerPort"] for one in pod["containers"][0]["ports"]}
        assert ports["serve"] == deploy.http_options.port
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in pod["containers"][0]["env"]
    assert deploy.http_options.host == "0.0.0.0"
    (tmp_path / "mounted.yaml").write_text(config_map["data"]["serve.yaml"], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2P_API__TOKENS", json.dumps(["a token of the secret"]))
        build = getattr(importlib.import_module(module), function)
        options = build({**application.args, "config": str(tmp_path / "mounted.yaml")})._bound_deployment
    actor = options.ray_actor_options
    limits = pods[1]["containers"][0]["resources"]["limits"]
    assert (actor["num_cpus"], actor["num_gpus"]) == (limits["cpu"], 0)
    scaling = options._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    with pytest.raises(ConfigError, match="tokens"):  # the control: nobody gave the secret
        build({**application.args, "config": str(tmp_path / "mounted.yaml")})


def test_control_a_wrong_option_or_module_does_not_parse(configs: dict[Kind, Path], tmp_path: Path) -> None:
    documents = rendered("generate", configs)
    good = ray_job_spec(documents)["entrypoint"]
    for number, (old, new) in enumerate([("num_gpus", "num_gpu"), ("jobs.generate", "jobs.generates")]):
        (tmp_path / str(number)).mkdir()
        ray_job_spec(documents)["entrypoint"] = good.replace(old, new)
        with pytest.raises((ConfigError, ModuleNotFoundError)):
            parsed_entrypoint(documents, tmp_path / str(number))


def test_a_schedule_runs_a_verb_that_exists_with_a_file_that_is_there(configs: dict[Kind, Path]) -> None:
    documents = {document["kind"]: document for document in rendered("schedule", configs)}
    pod = documents["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"][:4] == ["python", "-m", "jobs.cluster", "submit"]
    file = Path(container["command"][4])
    assert str(file.parent) == container["volumeMounts"][0]["mountPath"]
    assert file.name in documents["ConfigMap"]["data"]
    assert pod["volumes"][0]["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
    account = documents["ServiceAccount"]["metadata"]
    assert pod["serviceAccountName"] == account["name"]
    assert documents["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
    ZoneInfo(documents["CronJob"]["spec"]["timeZone"])


def click_problem(command: Command, words: list[str]) -> str:
    """Why Ray's command line would refuse these words; empty when it would not."""
    try:
        command.make_context(str(command.name), list(words))
    except UsageError as error:
        return error.format_message()
    return ""


_RAY_COMMAND = re.compile(r"(?m)(?:^|[\s`|(])ray ((?:[a-z-]+)(?:[^`\n|#)]|\\\n)*)")


def ray_command_problems(text: str) -> list[str]:
    """Every `ray ...` command in a text that Ray's command line refuses."""
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts import scripts

    known: dict[str, Command] = {**scripts.cli.commands, "job": submit}
    found = []
    for line in _RAY_COMMAND.findall(text):
        verb, *words = shlex.split(line.replace("\\\n", " ").partition("||")[0])
        if verb == "job":
            assert words.pop(0) == "submit"
        found += [f"{line}: {said}" for said in [click_problem(known[verb], words)] if said]
    return found


# `ray up`


def aws_file(*words: str) -> dict[str, Any]:
    (document,) = rendered("aws", {}, *AMI, *words)
    return document


def test_the_file_for_ray_up_fits_rays_own_schema() -> None:
    document = aws_file()
    jsonschema.validate(document, autoscaler_schema())
    types = document["available_node_types"]
    assert document["head_node_type"] in types
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert {name for name, kind in types.items() if spot.items() <= kind["node_config"].items()} == {"plan", "generate"}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) == document["max_workers"]
    assert any("RAY_AUTH_MODE=token" in option for option in document["docker"]["run_options"])
    assert document["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    commands = document["head_start_ray_commands"] + document["worker_start_ray_commands"]
    assert len(commands) == 4
    assert not ray_command_problems("\n".join(commands))
    assert "--dashboard-host=127.0.0.1" in commands[1]  # reached through ssh only
    on_demand = aws_file("--plan_workers.spot", "false")["available_node_types"]["plan"]["node_config"]
    assert "InstanceMarketOptions" not in on_demand


def test_the_nodes_are_arguments_that_ec2_takes() -> None:
    import boto3
    from botocore.validate import validate_parameters

    model = boto3.client("ec2", region_name="us-east-1").meta.service_model.operation_model("RunInstances").input_shape
    for kind in aws_file()["available_node_types"].values():
        validate_parameters({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, model)
        with pytest.raises(Exception, match="Unknown parameter"):
            validate_parameters({**kind["node_config"], "MinCount": 1, "MaxCount": 1, "Spot": True}, model)


def test_control_a_wrong_file_for_ray_up_is_refused() -> None:
    for name, value in (("worker_nodes", {}), ("max_workers", "many")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**aws_file(), name: value}, autoscaler_schema())
    assert ray_command_problems("ray start --heads --port=6379")
    assert ray_command_problems("`ray job submit --working-dirs . -- python x.py`")
    with pytest.raises(ConfigError, match=r"aws\.ami"):
        render("aws", load_settings(SETTINGS), None)


# Spot nodes


def run_drain(folder: Path, *processes: str) -> tuple[list[str], int]:
    """What the script asked of Ray, and how often it waited, on a machine with these processes."""
    tools, proc = folder / "tools", folder / "proc"
    tools.mkdir()
    for number, title in enumerate(processes):
        (proc / str(number + 1)).mkdir(parents=True)
        (proc / str(number + 1) / "cmdline").write_bytes(title.encode() + b"\0\0")
    for name in ("ray", "sleep"):
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >>{folder}/{name}.log\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PROC": str(proc)}
    subprocess.run([CLUSTER / "drain", "3"], env=environment, check=True)
    slept = folder / "sleep.log"
    return (folder / "ray.log").read_text().splitlines(), len(slept.read_text().splitlines()) if slept.exists() else 0


def test_a_node_that_goes_is_drained_and_its_actor_given_time(tmp_path: Path) -> None:
    (asked,), num_waits = run_drain(tmp_path, "ray::IDLE", "ray::MapWorker(MapBatches(ShardWorker)).submit")
    assert num_waits == 3
    assert not ray_command_problems("ray " + asked.replace("the pod ends", "'the pod ends'"))


def test_control_an_idle_node_goes_at_once(tmp_path: Path) -> None:
    _, num_waits = run_drain(tmp_path, "ray::IDLE", "ray::DashboardAgent", "grep ray:[:](MapWorker)")
    assert num_waits == 0


def test_pods_outlive_their_draining(configs: dict[Kind, Path]) -> None:
    for group in ray_job_spec(rendered("generate", configs))["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        tool, grace_s = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert int(grace_s) < pod["terminationGracePeriodSeconds"]
        assert f"/usr/local/bin/{tool}" in (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
        assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    groups = ray_job_spec(rendered("generate", configs, *SIZES[1]))["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["template"]["spec"]["nodeSelector"] for group in groups][1] == {}
    by_name = {group["groupName"]: group["template"]["spec"]["containers"][0] for group in groups}
    assert not [name for name, one in by_name.items() if "nvidia.com/gpu" in one["resources"]["limits"]]


# The image


def image_problems(dockerfile: str, dockerignore: str) -> list[str]:
    """Where the image is made of something else than the project says."""
    found = []
    (torch,) = (one for one in PROJECT["optional-dependencies"]["cpu"] if one.startswith("torch"))
    pinned = re.findall(r"\b([a-z_]+==[\w.]+)", dockerfile)
    if pinned != [torch]:
        found.append(f"pins {pinned}, and the project says {torch}")
    if torch.partition("==")[2] not in (ROOT / "jobs" / "setup-venv").read_text(encoding="utf-8"):
        found.append("jobs/setup-venv installs another torch")
    (python,) = re.findall(r"(?m)^FROM python:(\d+\.\d+)-slim$", dockerfile) or [""]
    if python not in SpecifierSet(PROJECT["requires-python"]):
        found.append(f"Python {python}")
    users = re.findall(r"(?m)^USER (\S+)", dockerfile)
    if not users or users[-1] in ("0", "root"):
        found.append("it runs as root")
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends (.+) \\", dockerfile)
    missing = {"openssh-client", "rsync", "wget"} - set(
        packages.split()
    )  # the last for KubeRay's probes of a RayService
    if missing:
        found.append(f"commands that clusters call are not there: {missing}")
    allowed = {line[1:] for line in dockerignore.splitlines() if line.startswith("!")}
    for words in re.findall(r"(?m)^COPY (?:--\S+ )?(.+) \S+$", dockerfile):
        for source in words.split():
            if not (ROOT / source).exists() or source not in allowed:
                found.append(f"COPY {source}: not there, or ignored")
    extras = re.findall(r"(?m)^ARG EXTRAS=(\S+)", dockerfile)
    if not set(extras) <= PROJECT["optional-dependencies"].keys() or 'pip install ".[$EXTRAS]"' not in dockerfile:
        found.append("the project is not installed with an extra of its own")
    return found


def image() -> tuple[str, str]:
    files = CLUSTER / "Dockerfile", CLUSTER / "Dockerfile.dockerignore"
    return files[0].read_text(encoding="utf-8"), files[1].read_text(encoding="utf-8")


def test_the_image_is_made_of_what_the_project_pins() -> None:
    assert not image_problems(*image())
    assert (CLUSTER / "drain").stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch==", "torch==9."),
        ("python:3.11-slim", "python:3.9-slim"),
        ("USER 1000", "USER root"),
        ("COPY jobs jobs", "COPY shared shared"),
        ("EXTRAS=cpu", "EXTRAS=gpu"),
        ("libgomp1", "ray==2.9.0"),
        ("wget ", ""),
    ],
)
def test_control_an_image_of_something_else_is_found(old: str, new: str) -> None:
    dockerfile, dockerignore = image()
    assert old in dockerfile
    assert image_problems(dockerfile.replace(old, new), dockerignore)


def test_the_project_brings_all_that_ray_clusters_need() -> None:
    needed = [Requirement(text) for text in importlib.metadata.requires("ray") or []]
    default = [one for one in needed if one.marker and one.marker.evaluate({"extra": "default"})]
    assert len(default) > 5
    missing = [one.name for one in default if importlib.metadata.version(one.name) not in one.specifier]
    assert not missing


# Settings and configurations


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--generate_workers.gpu", "1"), "did you mean gpus"),
        (("--generate_workers.max_nodes", "many"), r"generate_workers.max_nodes: .*\(command line\)"),
        (("--plan_workers.min_nodes", "9"), "min_nodes 9 is more than max_nodes 4"),
        (("--generate_workers.gpus", "8", "--generate_workers.cpus", "7"), "gpus 8 is more than cpus 7: each GPU's"),
        (("--name", "Ünique"), "name: "),
        (("--schedule", "daily"), "schedule: "),
        (("--max_hours", "inf"), "max_hours: "),
        (("--max_hours", "0.0001"), "max_hours: "),
    ],
)
def test_wrong_settings_are_named(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_settings(SETTINGS, words)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output": {"uri": "/home/me/out"}}, "no other machine sees /home/me/out"),
        ({"output": {"uri": "file:///home/me/out"}}, "no other machine sees file:///home/me/out"),
        (
            {"workers": {"ray_address": "10.0.0.5:6379"}},
            "ray_address '10.0.0.5:6379' is another Ray than that of the pods",
        ),
        ({"storage": {"secret_access_key": "canary"}}, "a ConfigMap is no place"),
        ({"api": {"tokens": ["canary canary canary"]}}, "a ConfigMap is no place"),
        ({"worker": {}}, "did you mean workers"),
    ],
)
def test_a_configuration_that_no_cluster_can_run_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, **changes}), encoding="utf-8")
    assert main(["render", "serve" if "api" in changes else "generate", "--config", str(path)]) == 2
    printed = capsys.readouterr()
    assert re.search(problem, printed.err)
    assert "canary" not in printed.out + printed.err


def test_variables_of_this_machine_do_not_count(
    configs: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rendered("generate", configs), rendered("serve", configs)
    monkeypatch.setenv("E2P_API__PORT", "1234")
    monkeypatch.setenv("E2P_OUTPUT__URI", "/home/me/out")
    monkeypatch.setenv("E2P_OUTPUT_URI", "no key of anything")
    assert (rendered("generate", configs), rendered("serve", configs)) == before
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump({**JOB, "output": {}}), encoding="utf-8")
    monkeypatch.setenv("E2P_OUTPUT__URI", "s3://bucket/out")
    with pytest.raises(ConfigError, match=r"output\.uri: Field required"):
        rendered("generate", {**configs, "generate": without})


def test_every_kind_is_rendered_by_the_command(configs: dict[Kind, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        words = [*AMI] if kind == "aws" else ["--config", str(configs[kind])]
        assert main(["render", kind, *words]) == 0
        assert list(yaml.safe_load_all(capsys.readouterr().out))
    assert main(["render", "generate"]) == 2


def test_ray_commands_of_the_documents_parse() -> None:
    for document in (ROOT / "README.md", CLUSTER / "README.md"):
        text = "\n".join(re.findall(r"(?s)```\n(.*?)```", document.read_text(encoding="utf-8")))
        assert len(_RAY_COMMAND.findall(text)) >= 4
        assert not ray_command_problems(text)
        for kind in re.findall(r"jobs\.cluster render (\S+)", text):
            assert kind in KINDS


def test_what_a_working_dir_uploads_is_small() -> None:
    """`ray job submit --working-dir .` takes what git does not ignore."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 100 << 20
    assert sys.executable not in {str(path) for path in files}
    assert json.loads((CLUSTER / "grafana-dashboard.json").read_text(encoding="utf-8"))["uid"] == "e2p-ray"
