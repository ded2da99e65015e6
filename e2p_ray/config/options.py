"""Configuration keys as people meet them: `--section.key VALUE` words, E2P_ variables, help and error messages.

All from the pydantic models alone: a key added there is known here.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from e2p_ray.errors import ConfigError

_ANY_NAME = "NAME"  # stands for a key of a dictionary
_WIDTH, _COLUMN = 118, 50
# A pod has variables of all services of its namespace: those of a service called e2p-... begin as ours do.
_OF_A_SERVICE = re.compile(r"(.+?)_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
_JSON = {"LIST": 'a list, like ["one", "another"]', "JSON": 'an object, like {"key": "value"}'}  # by kind


def parse_words(words: Sequence[str], prog: str, known: Collection[str]) -> dict[str, Any]:
    """`--a.b VALUE` and `--a.b=VALUE` as {"a": {"b": VALUE}}; a JSON list, object or null as VALUE counts as one.

    `known` are the options that there are: where a value is missing, the option may be another one misspelt.
    """
    found: dict[str, Any] = {}
    whole = set[str]()  # given as one value, with nothing below it since
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{prog}: {word!r} is not an option. Give --config FILE and --section.key VALUE")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                if name.partition(".")[0] not in {option[2:].partition(".")[0] for option in known}:
                    raise ConfigError(f"{prog}: unknown option --{name}{_nearest(f'--{name}', known)}")
                raise ConfigError(f"{prog}: --{name} needs a value")
        place = found
        *folders, last = name.split(".")
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{prog}: --{name} and one of its parents are both given")
        if isinstance(place.get(last), dict) and name not in whole:
            raise ConfigError(f"{prog}: --{name} would replace what is given below it before: give --{name} first")
        place[last] = _value(text)
        whole = {other for other in whole if not name.startswith(f"{other}.")} | {name}
    return found


def _value(text: str) -> Any:
    if text == "null" or text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def all_options(model: type[BaseModel], options_help: str) -> tuple[str, ...]:
    """`--section.key` of every key of the model, and the options that a help text names."""
    return (*(f"--{'.'.join(path)}" for path, _ in keys(model)), *re.findall(r"--[a-z][a-z-]*", options_help))


def check_environment(
    model: type[BaseSettings], others: Iterable[type[BaseSettings]], environment: Mapping[str, str]
) -> None:
    """ConfigError for every variable with our prefix that no section of the model or key of the others can take.

    Also for one whose value has to be JSON and is not. No value is said: it may be a secret.
    """
    prefix, delimiter = model.model_config["env_prefix"], str(model.model_config["env_nested_delimiter"])

    def variable(*path: str) -> str:
        return f"{prefix}{delimiter.join(path)}".upper()

    sections = tuple(map(variable, model.model_fields))
    known = {variable(*path) for path, _ in keys(model) if _ANY_NAME not in path}
    of_others = [key for other in others for key in keys(other)]
    elsewhere = {variable(*path[:end]) for path, _ in of_others for end in range(1, len(path) + 1)}
    of_dicts = tuple(f"{variable(*path)}{delimiter}" for path, field in of_others if _kind(field.annotation) == "JSON")
    problems = []
    for name, value in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(prefix.upper()) or _is_of_a_service(name, environment):
            continue
        if upper in sections or upper.startswith(tuple(f"{section}{delimiter}" for section in sections)):
            kind = _type_at(model, name[len(prefix) :].lower().split(delimiter))
            if kind is not None and (wanted := _JSON.get(_kind(kind))) and not _is_json(value):
                problems.append(f"  {name}: not JSON. Give {wanted}")
        elif upper not in elsewhere and not upper.startswith(of_dicts):
            problems.append(f"  {name}: unknown{_nearest(upper, elsewhere | known)}")
    if problems:
        raise ConfigError("\n".join([f"environment: {len(problems)} problem(s)", *problems]))


def _is_of_a_service(name: str, environment: Mapping[str, str]) -> bool:
    found = _OF_A_SERVICE.fullmatch(name)
    return found is not None and f"{found[1]}_SERVICE_HOST" in environment


def _type_at(kind: Any, path: Iterable[str]) -> Any:
    """The type of what lies at a path below a section or a dictionary; None where there is no such key."""
    for part in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        else:
            return None
    return kind


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


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
            default = field.get_default(call_default_factory=True, validated_data={})
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
    problems = error.errors(include_url=False, include_input=False)
    problems = [
        problem for problem in problems if problem["type"] != "default_factory_not_called"
    ]  # follows from another
    lines = [f"{file}: {len(problems)} problem(s)"]
    for problem in problems:
        path = [str(part) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
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
