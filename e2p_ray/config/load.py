"""Reading a configuration: YAML, then environment (E2P_...), then command line; unknown keys are errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from e2p_ray.config import options
from e2p_ray.config.evaluate import EvaluateConfig
from e2p_ray.config.file import read_file
from e2p_ray.config.sections import Config
from e2p_ray.config.serve import ServeConfig
from e2p_ray.config.train import TrainConfig
from e2p_ray.errors import ConfigError

C = TypeVar("C", bound=Config)

_ALL = (ServeConfig, TrainConfig, EvaluateConfig)  # what jobs.serve reads holds all of the main job's
_OTHER_VARIABLES = ("E2P_DEBUG", "E2P_TEST_")  # names or beginnings: ours, but no part of a job


def load_config(
    model: type[C],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    options_help: str = "",
    reads_environment: bool = True,
) -> C:
    """Read `--config FILE`, the environment (unless told not to) and `--section.key VALUE` options, the later winning.

    Raises ConfigError naming the file and every wrong key; prints help (`options_help` in it) and exits for --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(_help(model, prog, description, options_help))
        raise SystemExit(0)
    path, rest = _take_config_path(arguments, prog)
    words = options.parse_words(rest, prog, options.all_options(model, options_help))
    in_file = {} if path is None else read_file(path)
    if reads_environment:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(_OTHER_VARIABLES)}
        options.check_environment(model, _ALL, variables)
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
            given, file = (InitSettingsSource(settings_cls, values) for values in (words, in_file))
            if not reads_environment:
                return given, file
            seen["environment"] = env_settings()
            return given, env_settings, file

    try:
        loaded = _Sources()
    except ValidationError as error:
        raise ConfigError(
            options.explain(error, model, str(path or "configuration (no --config FILE given)"), seen)
        ) from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error
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
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder. Give the job's YAML in it with --config FILE")
            if not path.is_file():
                raise ConfigError(f"{path}: no such file. Give the job's YAML with --config FILE")
        else:
            rest.append(word)
    return path, rest
