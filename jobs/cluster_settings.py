"""cluster/settings.yaml: all that is particular about one's cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, model_validator

from e2p_ray.config.file import read_file
from e2p_ray.config.options import all_options, explain, parse_words
from e2p_ray.config.sections import Section
from e2p_ray.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent / "cluster"
SETTINGS = FOLDER / "settings.yaml"

# RayCronJob: 36 with "-schedule".
Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,25}[a-z0-9])?$")]
Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class HeadSettings(Section):
    """The machine of the driver."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=2)


class GroupSettings(Section):
    """A group of worker nodes, all alike."""

    cpus: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    memory_gib: int = Field(ge=2)
    min_nodes: int = Field(0, ge=0)
    max_nodes: int = Field(ge=1)
    spot: bool

    @model_validator(mode="after")
    def _ordered(self) -> GroupSettings:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than max_nodes {self.max_nodes}")
        if self.gpus > self.cpus:  # no node would ever hold its last actors, which the job would wait for
            raise ValueError(f"gpus {self.gpus} is more than cpus {self.cpus}: each GPU's actor takes a CPU")
        return self


class AwsSettings(Section):
    """What `ray up` needs besides."""

    region: str = Field(min_length=1)
    head_type: str = Field(min_length=1)
    plan_type: str = Field(min_length=1)
    generate_type: str = Field(min_length=1)
    disk_gib: int = Field(ge=50)
    ami: str = Field("", pattern=r"^(ami-[0-9a-f]+)?$")
    instance_profile: str = Field(min_length=1)


class ClusterSettings(Section):
    """cluster/settings.yaml; its comments say what is what."""

    name: Name
    image: str = Field(min_length=1)
    namespace: Namespace
    service_account: str = Field(min_length=1)
    secret: str = Field(min_length=1)
    schedule: str = Field(pattern=r"^\S+ \S+ \S+ \S+ \S+$")
    time_zone: str = Field(min_length=1)
    max_hours: float = Field(ge=0.01, allow_inf_nan=False)
    max_retries: int = Field(ge=0)
    head: HeadSettings
    plan_workers: GroupSettings
    generate_workers: GroupSettings
    serve_workers: GroupSettings
    spot_grace_s: int = Field(ge=1)
    spot_labels: dict[str, str]
    spot_taint: str
    aws: AwsSettings


def load_settings(path: Path, words: Sequence[str] = ()) -> ClusterSettings:
    """The settings of a file, with `--key VALUE` options over them; ConfigError names every wrong key."""
    given = parse_words(words, "jobs.cluster", all_options(ClusterSettings, ""))
    try:
        return ClusterSettings.model_validate(_over(read_file(path), given))
    except ValidationError as error:
        raise ConfigError(explain(error, ClusterSettings, str(path), {"command line": given})) from error


def _over(values: Any, given: dict[str, Any]) -> Any:
    """The options' values instead of the file's."""
    if not isinstance(values, dict):
        return given or values
    merged = dict(values)
    for name, value in given.items():
        merged[name] = _over(values.get(name), value) if isinstance(value, dict) else value
    return merged
