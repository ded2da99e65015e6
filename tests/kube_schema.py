"""What Kubernetes 1.27+ and the KubeRay operator (1.6 to 1.7) take of the fields that our manifests use: JSON schemas.

A RayCronJob is of 1.7: its timeZone is new there. Written for these manifests: a field that is not here is refused,
whether the operator knows it or not. The operator's own schemas are checked as well where E2P_TEST_KUBERAY_CRDS names
the folder with its `ray.io_*.yaml`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
LABEL: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
CRON: Schema = {"type": "string", "pattern": r"^[-0-9*/,A-Z]+( [-0-9*/,A-Z]+){4}$"}


def closed(required: str = "", **fields: Schema) -> Schema:
    """An object of these fields only."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def listed(item: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


QUANTITY: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(m|Mi|Gi)?$"}]}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY, "minProperties": 1}
RESOURCES = closed("requests limits", requests=QUANTITIES, limits=QUANTITIES)
META = closed("name namespace", name=LABEL, namespace=LABEL, labels=TEXTS)
CONTAINER = closed(
    "name image resources securityContext",
    name=LABEL,
    image=TEXT,
    command=listed(TEXT, 1),
    securityContext=closed(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation={"const": False},
        capabilities=closed("drop", drop={"const": ["ALL"]}),
    ),
    env=listed(closed("name value", name={"type": "string", "pattern": "^[A-Z_]+$"}, value=TEXT)),
    envFrom=listed(closed("secretRef", secretRef=closed("name", name=LABEL, optional=FLAG))),
    ports=listed(closed("name containerPort", name=LABEL, containerPort={"type": "integer", "maximum": 65535})),
    resources=RESOURCES,
    lifecycle=closed("preStop", preStop=closed("exec", exec=closed("command", command=listed(TEXT, 1)))),
    volumeMounts=listed(closed("name mountPath", name=LABEL, mountPath={"type": "string", "pattern": "^/"})),
)
POD = closed(
    "containers serviceAccountName securityContext enableServiceLinks",
    serviceAccountName=LABEL,
    enableServiceLinks={"const": False},
    restartPolicy={"enum": ["Never", "OnFailure"]},
    securityContext=closed(
        "runAsNonRoot",
        runAsNonRoot={"const": True},
        runAsUser=COUNT,
        fsGroup=COUNT,
        seccompProfile=closed("type", type={"const": "RuntimeDefault"}),
    ),
    nodeSelector=TEXTS,
    tolerations=listed(closed("key operator", key=TEXT, operator={"const": "Exists"})),
    terminationGracePeriodSeconds=COUNT,
    containers=listed(CONTAINER, 1),
    volumes=listed(closed("name configMap", name=LABEL, configMap=closed("name", name=LABEL))),
)
POD_TEMPLATE = closed("spec", metadata=closed(annotations=TEXTS), spec=POD)
RAY_CLUSTER = closed(
    "rayVersion headGroupSpec workerGroupSpecs authOptions",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed("mode", mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, resources=RESOURCES),
    headGroupSpec=closed("rayStartParams template", rayStartParams=TEXTS, template=POD_TEMPLATE),
    workerGroupSpecs=listed(
        closed(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=LABEL,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD_TEMPLATE,
        ),
        1,
    ),
)
RAY_JOB_SPEC = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)
RAY_SERVICE_SPEC = closed(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=TEXT,
    rayClusterConfig=RAY_CLUSTER,
    upgradeStrategy=closed("type", type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
)
CRON_JOB_SPEC = closed(
    "schedule jobTemplate",
    schedule=CRON,
    timeZone=TEXT,
    concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
    startingDeadlineSeconds=COUNT,
    successfulJobsHistoryLimit=COUNT,
    failedJobsHistoryLimit=COUNT,
    jobTemplate=closed("spec", spec=closed("template", backoffLimit=COUNT, template=POD_TEMPLATE)),
)
RULE = closed("apiGroups resources verbs", apiGroups=listed(TEXT), resources=listed(TEXT), verbs=listed(TEXT, 1))
SUBJECT = closed("kind name namespace", kind={"const": "ServiceAccount"}, name=LABEL, namespace=LABEL)
ROLE_REF = closed("apiGroup kind name", apiGroup={"const": "rbac.authorization.k8s.io"}, kind=TEXT, name=LABEL)


def kind(api_version: str, **fields: Schema) -> Schema:
    required = " ".join(["apiVersion", "kind", "metadata", *fields])
    return closed(required, apiVersion={"const": api_version}, kind=TEXT, metadata=META, **fields)


KINDS: dict[str, Schema] = {
    "ConfigMap": kind("v1", data=TEXTS),
    "ServiceAccount": kind("v1"),
    "Role": kind("rbac.authorization.k8s.io/v1", rules=listed(RULE, 1)),
    "RoleBinding": kind("rbac.authorization.k8s.io/v1", roleRef=ROLE_REF, subjects=listed(SUBJECT, 1)),
    "CronJob": kind("batch/v1", spec=CRON_JOB_SPEC),
    "RayJob": kind("ray.io/v1", spec=RAY_JOB_SPEC),
    "RayService": kind("ray.io/v1", spec=RAY_SERVICE_SPEC),
    "RayCronJob": kind(
        "ray.io/v1",
        spec=closed("schedule jobTemplate", schedule=CRON, timeZone=TEXT, jobTemplate=RAY_JOB_SPEC),
    ),
}


def problems(document: dict[str, Any], schemas: dict[str, Schema] = KINDS) -> list[str]:
    """What is wrong with one manifest; an unknown kind is wrong as well."""
    if document.get("kind") not in schemas:
        return [f"unknown kind {document.get('kind')}"]
    errors = jsonschema.Draft7Validator(schemas[document["kind"]]).iter_errors(document)
    return [f"{document['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def published_schemas() -> dict[str, Schema]:
    """The operator's own schemas, where they were obtained; unknown fields are errors, as for kubectl."""
    found = {}
    for path in sorted(Path(os.environ.get("E2P_TEST_KUBERAY_CRDS") or os.devnull).glob("*.yaml")):
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
        schema = next(one["schema"]["openAPIV3Schema"] for one in definition["versions"] if one["name"] == "v1")
        _close(schema)
        schema["properties"]["metadata"] = META
        found[definition["names"]["kind"]] = schema
    return found


def _close(schema: object) -> None:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close(part)
    elif isinstance(schema, list):
        for part in schema:
            _close(part)


def autoscaler_schema() -> Schema:
    """Ray's own schema of the YAML for `ray up`, out of the installed package."""
    import ray

    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    found: Schema = json.loads(path.read_text(encoding="utf-8"))
    return found
