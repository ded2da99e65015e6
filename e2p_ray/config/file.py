"""The YAML file of a configuration, read strictly: nothing in it is dropped, or read as other than it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from e2p_ray.errors import ConfigError

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def read_file(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. ConfigError, naming file and line, for whatever is wrong with it."""
    try:
        with path.open("rb") as stream:
            found = _Loader(stream).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        said = ", ".join(text for text in (error.context, error.problem) if text)
        raise ConfigError(f"{path}{line}: {said}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if found is not None and not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "one value"
        raise ConfigError(
            f"{path}: holds {kind}, not sections (`inputs:`, `output:` and so on, each with keys below it)"
        )
    return found or {}


class _Loader(yaml.SafeLoader):
    """Refuses keys that occur twice, of which YAML keeps the last, and those that it does not take for text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key has to be a name", key.start_mark)
            if key.tag != _TEXT:
                problem = f"YAML takes the key {key.value} for {key.tag.rpartition(':')[2]}, not text: quote it"
                raise ConstructorError(None, None, problem, key.start_mark)
            if key.value in lines:
                problem = f"the key {key.value!r} is there already, in line {lines[key.value]}: keep one of them"
                raise ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node
