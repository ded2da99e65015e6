"""The sections that configurations are made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from e2p_ray.config.braces import taken_apart
from e2p_ray.config.uris import DeltaUri, HttpUrl, ModelUri, Uri, absolute

_T = TypeVar("_T")

_FILLED_IN = ("{title}", "{body}")


class Config(BaseSettings):
    """The configuration of one kind of job: its sections."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="E2P_",
        env_nested_delimiter="__",
        env_parse_none_str="null",  # as in a file and on the command line
        hide_input_in_errors=True,
    )  # no message shows a value: it may be a secret

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain JSON, secrets masked: what is stored with what the job makes."""
        return self.model_dump(mode="json")


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise ValueError("use auto, cpu or cuda")
    return device


class InputsConfig(Section):
    """Where the input tables are: each a Parquet file, a folder of them or a Delta table; links are followed."""

    users_uri: Uri
    contents_uri: Uri
    candidates_uri: Uri


class OutputConfig(Section):
    """Where the published table, the runs and the plans are written."""

    uri: DeltaUri

    @property
    def table_uri(self) -> str:
        """The Delta table that readers open."""
        return f"{self.uri}/generations"


class StorageConfig(Section):
    """How s3:// is reached; credentials come from the usual AWS chain unless given here."""

    endpoint_url: HttpUrl | None = Field(None, description="http:// or https:// and the host; null: AWS")
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    max_attempts: int = Field(8, ge=1, description="tries of one call, with jittered exponential waits between")
    connect_timeout_s: float = Field(5.0, gt=0)
    read_timeout_s: float = Field(60.0, gt=0)


class BaseModelConfig(Section):
    """The frozen LLM: a local folder, an s3:// folder or a hub id with a revision."""

    uri: ModelUri
    revision: str | None = Field(None, description="hub revision; a commit hash is best")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, AfterValidator(_device)] = Field("auto", description="auto, cpu or cuda, the first GPU seen")
    cache_folder: str | None = Field(
        None, description="where each node keeps models from s3://; null: the machine's folder for temporary files"
    )

    def with_absolute_place(self) -> Self:
        """The same for a process that has another working folder."""
        if not Path(self.uri).is_dir():  # it is on S3, or a hub id
            return self
        return self.model_copy(update={"uri": absolute(self.uri)})


class ProjectorConfig(Section):
    """The projector artifact: a local or s3:// folder."""

    uri: Uri


class PromptTemplate(Section):
    """The text around the soft token in one language."""

    head: str = ""
    content: str = Field(
        "{title}\n\n{body}",
        description="{title} and {body} stand for the content's, here alone; other words in braces are errors. In "
        "all texts of a prompt {{word}} is written as {word}",
    )
    cue_before: str = ""
    cue_after: str = ""

    @field_validator("head", "cue_before", "cue_after")
    @classmethod
    def _is_as_it_stands(cls, text: str) -> str:
        if words := taken_apart(text)[1::2]:
            raise ValueError(_not_replaced(words[0], "in content are"))
        return text

    @field_validator("content")
    @classmethod
    def _holds_the_content(cls, text: str) -> str:
        words = taken_apart(text)[1::2]
        if unknown := [word for word in words if word not in _FILLED_IN]:
            raise ValueError(_not_replaced(unknown[0], "are"))
        if not words:
            raise ValueError(
                f"holds neither {' nor '.join(_FILLED_IN)}: all contents would have one and the same prompt"
            )
        return text


def _not_replaced(word: str, where: str) -> str:
    return f"{word} would not be replaced: only {' and '.join(_FILLED_IN)} {where}; {{{word}}} is written as {word}"


class SamplingConfig(Section):
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    repetition_penalty: float = Field(1.0, ge=1, description="1: none; divides the logits of tokens already written")
    no_repeat_ngram_tokens: int = Field(0, ge=0, description="0: off; n-grams of this length never repeat")
    max_new_tokens: int = Field(32, ge=1)
    max_chars: int | None = Field(None, ge=1, description="a text that gets longer ends, cut to so many; null: no cap")
    stop: tuple[str, ...] = ("\n",)
    seed: int = 0


class LimitsConfig(Section):
    """The bounds a task's text has to keep."""

    min_chars: int = Field(1, ge=1)
    max_chars: int = Field(200, ge=1)
    max_tokens: int = Field(64, ge=1)
    must_finish: bool = Field(True, description="reject a text that was cut by max_new_tokens or max_chars")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars is above max_chars ({self.max_chars}): no text keeps both")
        return self


def for_language(values: Mapping[str, _T], language: str) -> _T | None:
    """What is given for the language, else for its base language ('en' for 'en-US'), else by default, or None."""
    base = re.split(r"[-_]", language, maxsplit=1)[0]
    return next((values[name] for name in (language, base, "default") if name in values), None)


class TaskConfig(Section):
    """One kind of text: its prompt in every language, how it is sampled, what bounds it keeps."""

    prompts: dict[str, PromptTemplate] = Field(min_length=1, description="by language; 'default' serves the others")
    sampling: SamplingConfig = SamplingConfig()
    limits: LimitsConfig = LimitsConfig()
    max_content_tokens: int = Field(512, ge=1, description="longer contents keep their head")

    def prompt_for(self, language: str) -> PromptTemplate | None:
        """The language's own template, its base language's ('en' for 'en-US'), the default's, or None."""
        return for_language(self.prompts, language)

    def prompt_id(self, language: str, layout: str, num_soft_tokens: int) -> str:
        """Stable hash of everything about a prompt but the content and the user, also of there being none."""
        found = self.prompt_for(language)
        template = None if found is None else found.model_dump()
        parts = [layout, num_soft_tokens, self.max_content_tokens, template]
        if any("{{" in text for text in (template or {}).values()):
            parts.append("doubled braces")  # once they stood as they are: texts of then are not those of now
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


class ChecksConfig(Section):
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


class PlanConfig(Section):
    """How candidates become groups and shards."""

    requests_per_shard: int | None = Field(
        None,
        ge=1,
        description="aimed at; a shard never holds more than twice this; null: 2,048, and where workers have GPUs "
        "(workers.num_gpus) up to 16,384 in plans of millions",
    )
    max_group_requests: int = Field(1024, ge=1, description="a hot content is split into groups of at most this many")
    single_node_bytes: int = Field(
        2 << 30, ge=0, description="plans estimated below this are made by one polars process, others by Ray shuffles"
    )
    num_partitions: int | None = Field(None, ge=1, description="shuffle partitions; null: by size")


_USUAL_ROWS, _USUAL_BYTES = 512, 2 << 30


class EngineConfig(Section):
    """Bounds of the token loop."""

    kind: Literal["native", "vllm"] = Field("native", description="vllm: for models on several GPUs; extra [vllm]")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one model; vllm only")
    max_rows: int | None = Field(
        None,
        ge=1,
        description="rows decoded together; null: 544, on a GPU 4,096, but 512 where texts are written online",
    )
    max_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="keys, values and activations above the model; null: 2 GiB, on a GPU four fifths of what the model "
        "leaves free",
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of one engine; null: the actor's num_cpus")
    drafts: bool = Field(True, description="verify guessed texts where that saves time; texts are the same either way")
    keep_plain: bool | None = Field(
        None,
        description="keep fp32 weights on a CPU twice, packed and plain: passes over up to 4 rows take 0.8 of the "
        "time; null: where texts are written online",
    )

    @property
    def usual_rows(self) -> int:
        """Rows decoded together online, and by vLLM: there nobody asks what they are decoded on."""
        return self.max_rows or _USUAL_ROWS

    @property
    def usual_bytes(self) -> int:
        """The same of bytes."""
        return self.max_bytes or _USUAL_BYTES


class WorkersConfig(Section):
    """The pool of generator actors."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    min_size: int = Field(1, ge=1)
    max_size: int = Field(
        default_factory=lambda data: data.get("min_size", 1), ge=1, description="left out: as many as min_size"
    )
    max_shard_attempts: int = Field(3, ge=1)
    max_stall_s: float = Field(1800.0, gt=0, description="an attempt without any finished shard for this long ends")
    max_step_s: float = Field(
        600.0, gt=0, description="a worker whose engine makes no step for this long is ended and replaced"
    )
    max_poison_requests: int = Field(
        8,
        ge=0,
        description="requests a run may lose because whoever writes them dies; 0: no shard is searched for them",
    )
    ray_address: str | None = Field(None, description="null: the cluster of this process, else a local one")
    log_shards: bool = Field(True, description="one JSON line a shard in the actors' logs, which Ray keeps")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError("min_size is above max_size")
        return self


class GatesConfig(Section):
    """Shares above which a complete run is not published."""

    max_fallback_share: float = Field(0.5, ge=0, le=1)
    max_dead_letter_share: float = Field(0.05, ge=0, le=1)
    max_same_text_share: float = Field(
        0.5, ge=0, le=1, description="share of the personalised texts of one task that may be one and the same text"
    )
