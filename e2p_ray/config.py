"""The configuration of every job: YAML, then environment (E2P_...), then command line; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from e2p_ray import options
from e2p_ray.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _no_trailing_slash(uri: str) -> str:
    return uri.rstrip("/") if len(uri) > 1 else uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_no_trailing_slash)]


class InputsConfig(_Section):
    """Where the input tables are: a Parquet file or a folder of Parquet files each."""

    users_uri: Uri
    contents_uri: Uri
    candidates_uri: Uri


class OutputConfig(_Section):
    """Where the published table, the runs and the plans are written."""

    uri: Uri

    @property
    def table_uri(self) -> str:
        """The Delta table that readers open."""
        return f"{self.uri}/generations"


class StorageConfig(_Section):
    """How s3:// is reached; credentials come from the usual AWS chain unless given here."""

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    max_attempts: int = Field(8, ge=1, description="tries of one call, with jittered exponential waits between")
    connect_timeout_s: float = Field(5.0, gt=0)
    read_timeout_s: float = Field(60.0, gt=0)


class BaseModelConfig(_Section):
    """The frozen LLM: a local folder, an s3:// folder or a hub id with a revision."""

    uri: str = Field(min_length=1)
    revision: str | None = Field(None, description="hub revision; a commit hash is best")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


class ProjectorConfig(_Section):
    """The projector artifact: a local or s3:// folder."""

    uri: Uri


class PromptTemplate(_Section):
    """The text around the soft token in one language; {title} and {body} stand for the content's."""

    head: str = ""
    content: str = "{title}\n\n{body}"
    cue_before: str = ""
    cue_after: str = ""


class SamplingConfig(_Section):
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    repetition_penalty: float = Field(1.0, ge=1, description="1: none; divides the logits of tokens already written")
    no_repeat_ngram_tokens: int = Field(0, ge=0, description="0: off; n-grams of this length never repeat")
    max_new_tokens: int = Field(32, ge=1)
    max_chars: int | None = Field(None, ge=1)
    stop: tuple[str, ...] = ("\n",)
    seed: int = 0


class LimitsConfig(_Section):
    """The bounds a task's text has to keep."""

    min_chars: int = Field(1, ge=1)
    max_chars: int = Field(200, ge=1)
    max_tokens: int = Field(64, ge=1)
    must_finish: bool = Field(True, description="reject a text that was cut by max_new_tokens or max_chars")


class TaskConfig(_Section):
    """One kind of text: its prompt in every language, how it is sampled, what bounds it keeps."""

    prompts: dict[str, PromptTemplate] = Field(min_length=1, description="by language; 'default' serves the others")
    sampling: SamplingConfig = SamplingConfig()
    limits: LimitsConfig = LimitsConfig()
    max_content_tokens: int = Field(512, ge=1, description="longer contents keep their head")

    def prompt_for(self, language: str) -> PromptTemplate | None:
        """The language's own template, its base language's ('en' for 'en-US'), the default's, or None."""
        base = re.split(r"[-_]", language, maxsplit=1)[0]
        return self.prompts.get(language) or self.prompts.get(base) or self.prompts.get("default")


class ChecksConfig(_Section):
    """What a text is checked for before it may be published."""

    language: bool = True
    repetition: bool = True
    foreign_contacts: bool = Field(True, description="URLs, mail, phone numbers, addresses the content lacks")
    foreign_numbers: bool = True
    foreign_names: bool = True
    deny: tuple[str, ...] = ()
    allow: tuple[str, ...] = Field((), description="names that may occur though the content lacks them")
    retry: bool = Field(True, description="one sampled try after a rejected text")
    retry_temperature: float = Field(0.7, gt=0)


class PlanConfig(_Section):
    """How candidates become groups and shards."""

    requests_per_shard: int = Field(2048, ge=1, description="aimed at; a shard never holds more than twice this")
    max_group_requests: int = Field(1024, ge=1, description="a hot content is split into groups of at most this many")
    single_node_bytes: int = Field(
        2 << 30, ge=0, description="plans estimated below this are made by one polars process, others by Ray shuffles"
    )
    num_partitions: int | None = Field(None, ge=1, description="shuffle partitions; null: by size")


class EngineConfig(_Section):
    """Bounds of the token loop."""

    max_rows: int = Field(256, ge=1, description="rows decoded together; 128-256 on CPU, 1,000-4,000 on a large GPU")
    max_bytes: int = Field(2 << 30, ge=1 << 20, description="keys, values and activations above the model")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of one engine; null: the actor's num_cpus")


class WorkersConfig(_Section):
    """The pool of generator actors."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    min_size: int = Field(1, ge=1)
    max_size: int = Field(1, ge=1)
    max_shard_attempts: int = Field(3, ge=1)
    max_stall_s: float = Field(1800.0, gt=0, description="an attempt without any finished shard for this long ends")
    ray_address: str | None = Field(None, description="null: the cluster of this process, else a local one")


class GatesConfig(_Section):
    """Shares above which a complete run is not published."""

    max_fallback_share: float = Field(0.5, ge=0, le=1)
    max_dead_letter_share: float = Field(0.05, ge=0, le=1)
    max_same_text_share: float = Field(
        0.5, ge=0, le=1, description="share of all texts of one task and language that may be one and the same text"
    )


class JobConfig(BaseSettings):
    """Everything that determines a run."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="E2P_", env_nested_delimiter="__")

    inputs: InputsConfig
    output: OutputConfig
    base_model: BaseModelConfig
    projector: ProjectorConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    storage: StorageConfig = StorageConfig()
    plan: PlanConfig = PlanConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checks: ChecksConfig = ChecksConfig()
    gates: GatesConfig = GatesConfig()

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain JSON, secrets masked: what is stored with a run."""
        return self.model_dump(mode="json")

    def text_hash(self) -> str:
        """Hash of the parts that determine the texts of given requests: tasks, checks, dtype."""
        parts = {
            "tasks": {name: task.model_dump(mode="json") for name, task in self.tasks.items()},
            "checks": self.checks.model_dump(mode="json"),
            "dtype": self.base_model.dtype,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


_OTHER_VARIABLES = ("E2P_DEBUG", "E2P_TEST_")  # names or beginnings: ours, but no part of a job


def load_config(argv: Sequence[str] | None = None, *, prog: str, description: str, options_help: str = "") -> JobConfig:
    """Read `--config FILE`, the environment and `--section.key VALUE` options, the later winning.

    Raises ConfigError naming the file and every wrong key; prints help (`options_help` in it) and exits for --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(_help(prog, description, options_help))
        raise SystemExit(0)
    path, rest = _take_config_path(arguments, prog)
    words = options.parse_words(rest, prog)
    prefix, delimiter = "E2P_", "__"
    options.check_environment(
        JobConfig, prefix, delimiter, [name for name in os.environ if not name.startswith(_OTHER_VARIABLES)]
    )
    seen: dict[str, dict[str, Any]] = {"command line": words}

    class _Sources(JobConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            seen["environment"] = env_settings()
            yaml = YamlConfigSettingsSource(settings_cls, yaml_file=path)
            return (InitSettingsSource(settings_cls, words), env_settings, yaml)

    try:
        loaded = _Sources()
    except ValidationError as error:
        raise ConfigError(
            options.explain(error, JobConfig, str(path or "configuration (no --config FILE given)"), seen)
        ) from error
    except Exception as error:  # the sources raise SettingsError, YAMLError and OSError alike
        raise ConfigError(f"{path or prog}: {error}") from error
    return JobConfig.model_construct(**{name: getattr(loaded, name) for name in JobConfig.model_fields})


def _help(prog: str, description: str, options_help: str) -> str:
    usage = f"usage: python -m {prog} --config FILE [options] [--section.key VALUE ...]"
    keys = (
        "Every key of the configuration can stand in FILE (YAML), in the environment (E2P_SECTION__KEY) or on the\n"
        "command line (--section.key VALUE); the later wins. A LIST is JSON. NAME is a task, then a language.\n"
    )
    return "\n".join(
        [usage, "", description, "", *([options_help] if options_help else []), keys, options.describe(JobConfig)]
    )


def _take_config_path(arguments: list[str], prog: str) -> tuple[Path | None, list[str]]:
    rest, path = [], None
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] or next(words, "")
            if not value:
                raise ConfigError(f"{prog}: --config needs a file")
            path = Path(value)
            if not path.is_file():
                raise ConfigError(f"{path}: no such file. Give the job's YAML with --config FILE")
        else:
            rest.append(word)
    return path, rest
