"""Configuration keys as people meet them: `--section.key VALUE` words, E2P_ variables, help and error messages.

All from the pydantic models alone: a key added there is known here.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from e2p_ray.errors import ConfigError

_ANY_NAME = "NAME"  # stands for a key of a dictionary
_WIDTH, _COLUMN = 118, 50


def parse_words(words: Sequence[str], prog: str) -> dict[str, Any]:
    """`--a.b VALUE` and `--a.b=VALUE` as {"a": {"b": VALUE}}; a JSON list, object or null as VALUE counts as one."""
    found: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{prog}: {word!r} is not an option. Give --config FILE and --section.key VALUE")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise ConfigError(f"{prog}: --{name} needs a value")
        place = found
        *folders, last = name.split(".")
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{prog}: --{name} and one of its parents are both given")
        place[last] = _value(text)
    return found


def _value(text: str) -> Any:
    if text == "null" or text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def check_environment(model: type[BaseModel], prefix: str, delimiter: str, environment: Iterable[str]) -> None:
    """ConfigError for every variable with our prefix that no section of the model can take."""
    known = {f"{prefix}{delimiter.join(path)}".upper() for path, _ in keys(model) if _ANY_NAME not in path}
    sections = tuple(f"{prefix}{name}".upper() for name in model.model_fields)
    problems = []
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(prefix.upper()) or upper in sections:
            continue
        if not upper.startswith(tuple(f"{section}{delimiter}" for section in sections)):
            problems.append(f"  {name}: unknown{_nearest(upper, known)}")
    if problems:
        lines = [f"environment: {len(problems)} variable(s) that no key of the configuration matches", *problems]
        raise ConfigError("\n".join(lines))


def keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key that can be set, as its path and field; NAME stands for the keys of dictionaries."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        section, is_dict = _section_of(field.annotation)
        if section is None:
            yield path, field
        else:
            yield from keys(section, (*path, _ANY_NAME) if is_dict else path)


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if get_origin(annotation) is dict:
        return _section_of(get_args(annotation)[1])[0], True
    return (annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None), False


def describe(model: type[BaseModel]) -> str:
    """All keys with type, default and description, for --help."""
    lines: list[str] = []
    for path, field in keys(model):
        if field.is_required():
            says = "required"
        else:
            default = field.get_default(call_default_factory=True)
            says = "default " + ("none" if default is None else json.dumps(default, ensure_ascii=False, default=list))
        if field.description:
            says = f"{field.description} ({says})"
        head = f"  --{'.'.join(path)} {_kind(field.annotation)}"
        gap = " " * max(2, _COLUMN - len(head))
        lines += textwrap.wrap(f"{head}{gap}{says}", _WIDTH, subsequent_indent=" " * _COLUMN, break_on_hyphens=False)
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return "|".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return "LIST"
    if annotation is SecretStr:
        return "SECRET"
    return {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "true|false"}.get(annotation.__name__, "JSON")


def explain(error: ValidationError, model: type[BaseModel], file: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """A validation error as one line a key, with where it was set when that was not the file."""
    lines = [f"{file}: {error.error_count()} problem(s)"]
    for problem in error.errors(include_url=False, include_input=False):
        path = [str(part) for part in problem["loc"]]
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = "unknown key" + _nearest(path[-1], _names_at(model, path[:-1]))
        source = next((name for name, values in sources.items() if _holds(values, path)), None)
        given = f" ({source})" if source else ""
        lines.append(f"  {'.'.join(path) or '(top level)'}: {message}{given}")
    return "\n".join(lines)


def _holds(values: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return bool(path)


def _names_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    rest = list(path)
    while rest:
        field = model.model_fields.get(rest.pop(0))
        section, is_dict = _section_of(field.annotation) if field else (None, False)
        if section is None:
            return []
        if is_dict and rest:
            rest.pop(0)
        model = section
    return list(model.model_fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
