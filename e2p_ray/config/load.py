"""Reading a configuration: YAML, then environment (E2P_...), then command line; unknown keys are errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from e2p_ray.config import options
from e2p_ray.errors import ConfigError


class Config(BaseSettings):
    """The configuration of one kind of job."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="E2P_", env_nested_delimiter="__", hide_input_in_errors=True
    )  # no message shows a value: it may be a secret

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain JSON, secrets masked: what is stored with what the job makes."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=Config)

_OTHER_VARIABLES = ("E2P_DEBUG", "E2P_TEST_")  # names or beginnings: ours, but no part of a job


def load_config(
    model: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str, options_help: str = ""
) -> C:
    """Read `--config FILE`, the environment and `--section.key VALUE` options, the later winning.

    Raises ConfigError naming the file and every wrong key; prints help (`options_help` in it) and exits for --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(_help(model, prog, description, options_help))
        raise SystemExit(0)
    path, rest = _take_config_path(arguments, prog)
    words = options.parse_words(rest, prog)
    prefix, delimiter = "E2P_", "__"
    options.check_environment(
        model, prefix, delimiter, [name for name in os.environ if not name.startswith(_OTHER_VARIABLES)]
    )
    seen: dict[str, dict[str, Any]] = {"command line": words}

    class _Sources(model):  # type: ignore[misc, valid-type]
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
            options.explain(error, model, str(path or "configuration (no --config FILE given)"), seen)
        ) from error
    except Exception as error:  # the sources raise SettingsError, YAMLError and OSError alike
        raise ConfigError(f"{path or prog}: {error}") from error
    found = model.model_construct(**{name: getattr(loaded, name) for name in model.model_fields})
    assert isinstance(found, model)
    return found


def _help(model: type[Config], prog: str, description: str, options_help: str) -> str:
    usage = f"usage: python -m {prog} --config FILE [options] [--section.key VALUE ...]"
    keys = (
        "Every key of the configuration can stand in FILE (YAML), in the environment (E2P_SECTION__KEY) or on the\n"
        "command line (--section.key VALUE); the later wins. A LIST is JSON. NAME is a task, then a language.\n"
    )
    return "\n".join(
        [usage, "", description, "", *([options_help] if options_help else []), keys, options.describe(model)]
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
