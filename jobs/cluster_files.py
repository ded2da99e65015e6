"""From cluster/settings.yaml and a job's configuration to Kubernetes manifests and the YAML of `ray up`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from e2p_ray.config import Config, JobConfig, ServeConfig, TrainConfig, load_config
from e2p_ray.errors import ConfigError
from e2p_ray.serve.front import FLAGS
from jobs.cluster_settings import FOLDER, AwsSettings, ClusterSettings, GroupSettings

Kind = Literal["generate", "train", "schedule", "raycronjob", "serve", "aws"]
KINDS: tuple[Kind, ...] = ("generate", "train", "schedule", "raycronjob", "serve", "aws")
_END_S = 10  # between the end of a pod's preStop and its death
_SECRETS = {"storage": ("access_key_id", "secret_access_key"), "api": ("tokens",)}
_POD_FOLDER = "/etc/e2p"
_SOME_TOKEN = ("--api.tokens", json.dumps(["stands for those of the Secret"]))
C = TypeVar("C", bound=Config)


def render(kind: Kind, settings: ClusterSettings, config: Path | None) -> str:
    """Everything that `kubectl apply -f -` needs of one kind, or the file for `ray up`.

    Raises ConfigError for a job configuration that the job would refuse, and for one that holds secrets.
    """
    if kind == "aws":
        return _as_yaml([_aws(settings)])
    if config is None:
        raise ConfigError(f"render {kind}: give the job's configuration with --config FILE")
    if kind == "serve":
        return _as_yaml(_ray_service(settings, config))
    job = "train" if kind == "train" else "generate"
    text, _ = _job(config, TrainConfig if job == "train" else JobConfig)
    places = _places(settings, job)
    ray_job = _ray_job(settings, job, places)
    config_map = _template("config_map", places)
    config_map["data"] = {f"{job}.yaml": text}
    if kind in ("generate", "train"):
        return _as_yaml([config_map, ray_job])
    if kind == "raycronjob":
        scheduled = _template("ray_cron_job", places)
        scheduled["spec"]["jobTemplate"] = ray_job["spec"]
        return _as_yaml([config_map, scheduled])
    config_map["data"]["rayjob.yaml"] = _as_yaml([ray_job])
    return _as_yaml([config_map, *_templates("cron_job", places)])


def entrypoint(settings: ClusterSettings, job: str, config: str) -> list[str]:
    """The command of a job on this cluster; sizes come from the settings, whatever the configuration says."""
    group = settings.generate_workers
    words = ["python", "-m", f"jobs.{job}", "--config", config, "--workers.num_gpus", str(min(group.gpus, 1))]
    if job == "train":
        return [*words, "--workers.num_cpus", _actor_cpus(group), "--workers.num_workers", str(_num_actors(group))]
    sizes = ["--workers.min_size", str(max(group.min_nodes, 1)), "--workers.max_size", str(_num_actors(group))]
    return [*words, "--workers.num_cpus", _actor_cpus(group), *sizes]


def _num_actors(group: GroupSettings) -> int:
    """One a GPU; on CPUs one a node."""
    return group.max_nodes * max(group.gpus, 1)


def _actor_cpus(group: GroupSettings) -> str:
    return str(group.cpus // max(group.gpus, 1))


def _ray_job(settings: ClusterSettings, job: str, places: dict[str, Any]) -> dict[str, Any]:
    command = shlex.join(entrypoint(settings, job, f"{_POD_FOLDER}/{job}.yaml"))
    ray_job = _template("ray_job", places | {"entrypoint": json.dumps(command)})
    cluster = _template("ray_cluster", places)
    groups = {"plan": settings.plan_workers, "generate": settings.generate_workers}
    cluster["workerGroupSpecs"] = [_worker_group(settings, name, group, places) for name, group in groups.items()]
    ray_job["spec"]["rayClusterSpec"] = cluster
    return ray_job


def _ray_service(settings: ClusterSettings, path: Path) -> list[dict[str, Any]]:
    """The service with its configuration; a new projector in it is swapped in, anything else makes a new cluster."""
    from e2p_ray.serve.app import serve_file  # Ray Serve takes seconds to import

    group, options = settings.serve_workers, serve_options(settings)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    text, config = _job(path, ServeConfig, *words, *_SOME_TOKEN)
    places = _places(settings, "serve")
    config_map = _template("config_map", places)
    config_map["data"] = {"serve.yaml": text}
    service, cluster = _template("ray_service", places), _template("ray_cluster", places)
    cluster["workerGroupSpecs"] = [_worker_group(settings, "serve", group, places)]
    head, worker = (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    # The application is built on any node, and all of them answer.
    worker["volumes"] = head["volumes"]
    worker["containers"][0]["volumeMounts"] = head["containers"][0]["volumeMounts"]
    for pod in (head, worker):
        pod["containers"][0]["ports"].append({"name": "serve", "containerPort": config.api.port})
        pod["containers"][0]["env"] = [{"name": name, "value": value} for name, value in FLAGS.items()]
    service["spec"]["serveConfigV2"] = _as_yaml([serve_file(config, f"{_POD_FOLDER}/serve.yaml", options)])
    service["spec"]["rayClusterConfig"] = cluster
    return [config_map, service]


def serve_options(settings: ClusterSettings) -> dict[str, str]:
    """What is set over a serve.yaml on this cluster: sizes come from the settings, whatever the configuration says."""
    group = settings.serve_workers
    return {
        "api.host": "0.0.0.0",
        "workers.num_cpus": _actor_cpus(group),
        "workers.num_gpus": str(min(group.gpus, 1)),
        "replica.min_replicas": str(group.min_nodes * max(group.gpus, 1)),
        "replica.max_replicas": str(_num_actors(group)),
    }


def _worker_group(settings: ClusterSettings, name: str, group: GroupSettings, places: dict[str, Any]) -> dict[str, Any]:
    resources: dict[str, object] = {"cpu": group.cpus, "memory": f"{group.memory_gib}Gi"}
    tolerated = ["nvidia.com/gpu"] if group.gpus else []
    if group.gpus:
        resources["nvidia.com/gpu"] = group.gpus
    if group.spot and settings.spot_taint:
        tolerated.append(settings.spot_taint)
    own = {
        "group": name,
        "min_nodes": group.min_nodes,
        "max_nodes": group.max_nodes,
        "node_selector": json.dumps(settings.spot_labels if group.spot else {}),
        "tolerations": json.dumps([{"key": key, "operator": "Exists"} for key in tolerated]),
        "resources": json.dumps({"requests": resources, "limits": resources}),
    }
    return _template("worker_group", places | own)


def _aws(settings: ClusterSettings) -> dict[str, Any]:
    aws, plan, generate = settings.aws, settings.plan_workers, settings.generate_workers
    if not aws.ami:
        raise ConfigError("aws.ami: give the id of an image of your region with docker (and the GPU's driver) on it")
    return _template(
        "aws",
        {
            "name": settings.name,
            "image": settings.image,
            "region": aws.region,
            "max_workers": plan.max_nodes + generate.max_nodes,
            "plan_min": plan.min_nodes,
            "plan_max": plan.max_nodes,
            "generate_min": generate.min_nodes,
            "generate_max": generate.max_nodes,
            "head_node": json.dumps(_ec2_node(aws, aws.head_type, spot=False)),
            "plan_node": json.dumps(_ec2_node(aws, aws.plan_type, spot=plan.spot)),
            "generate_node": json.dumps(_ec2_node(aws, aws.generate_type, spot=generate.spot)),
        },
    )


def _ec2_node(aws: AwsSettings, instance_type: str, *, spot: bool) -> dict[str, Any]:
    """Arguments of EC2's RunInstances."""
    node: dict[str, Any] = {
        "InstanceType": instance_type,
        "ImageId": aws.ami,
        "IamInstanceProfile": {"Name": aws.instance_profile},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": aws.disk_gib, "VolumeType": "gp3"}}],
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},  # 2: from within a container
    }
    if spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    return node


def _places(settings: ClusterSettings, job: str) -> dict[str, Any]:
    """What the templates' names stand for."""
    return {
        "name": settings.name,
        "namespace": settings.namespace,
        "image": settings.image,
        "service_account": settings.service_account,
        "secret": settings.secret,
        "schedule": json.dumps(settings.schedule),
        "time_zone": settings.time_zone,
        "max_s": round(settings.max_hours * 3600),
        "max_retries": settings.max_retries,
        "head_cpus": settings.head.cpus,
        "head_memory_gib": settings.head.memory_gib,
        "spot_grace_s": settings.spot_grace_s,
        "termination_s": settings.spot_grace_s + _END_S,
        "ray_version": version("ray"),
        "job_name": f"{settings.name}-{job}",
        "config_map": f"{settings.name}-{job}-config",
    }


def _job(path: Path, model: type[C], *words: str) -> tuple[str, C]:
    """The configuration as text, and read with these options; ConfigError where it is refused or holds secrets.

    The pods have no E2P_ variables of this machine: what counts is what the file says.
    """
    arguments = ["--config", str(path), *words]
    config = load_config(model, arguments, prog="jobs.cluster", description="", reads_environment=False)
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text) or {}
    for section, names in _SECRETS.items():
        if any((values.get(section) or {}).get(name) is not None for name in names):
            remedy = "put AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and E2P_API__TOKENS into the Secret of the settings"
            raise ConfigError(f"{path}: {section} holds keys, and a ConfigMap is no place for them; {remedy}")
    resolved = config.resolved()
    if local := [uri for uri in _uris(resolved) if not uri.startswith("s3://")]:
        raise ConfigError(f"{path}: no other machine sees {', '.join(local)}; use s3:// places on a cluster")
    if (address := resolved["workers"]["ray_address"]) not in (None, "auto"):
        raise ConfigError(f"{path}: workers.ray_address {address!r} is another Ray than that of the pods; leave it out")
    return text, config


def _uris(values: Any) -> list[str]:
    """All input and output places of a configuration; a base model may be a hub id."""
    sections = [values.get(name, {}) for name in ("inputs", "output", "projector")]
    return [uri for section in sections for name, uri in section.items() if name.endswith("uri") and uri]


def _template(name: str, places: dict[str, Any]) -> dict[str, Any]:
    (document,) = _templates(name, places)
    return document


def _templates(name: str, places: dict[str, Any]) -> list[dict[str, Any]]:
    path = FOLDER / "templates" / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error}. Render from a checkout of the repository") from error
    return list(yaml.safe_load_all(Template(text).substitute(places)))


def _as_yaml(documents: Sequence[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _text_node(dumper: Any, text: str) -> yaml.ScalarNode:
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
    return node


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors."""

    yaml_representers: ClassVar[dict[Any, Any]] = {**yaml.SafeDumper.yaml_representers, str: _text_node}

    def ignore_aliases(self, data: Any) -> bool:
        return True
