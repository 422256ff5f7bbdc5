"""From a JSON file, `--set` overrides and a DeepSpeed file to a checked `Config`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .base import choices
from .checks import check_world, missing_files
from .deepspeed_section import check_keys
from .errors import ConfigError, Problem, closest, raise_problems, unknown_key
from .rules import check_rules
from .tree import Config

Tree = dict[str, Any]


def load_config(
    path: str | Path,
    overrides: Iterable[str] = (),
    deepspeed_config: str | Path | None = None,
    *,
    world_size: int | None = None,
    check_files: bool = False,
) -> Config:
    """Read `path`, merge a DeepSpeed JSON file into its deepspeed section, apply `a.b=value`, check.

    With `world_size` the layout is checked against that many ranks, with `check_files` the data and tokenizer
    must be there. Raises ConfigError with every problem found, one line each.
    """
    tree = read_json(path)
    problems: list[Problem] = []
    if deepspeed_config is not None:
        problems += merge_deepspeed(tree, read_json(deepspeed_config), str(deepspeed_config))
    for override in overrides:
        problems += apply_override(tree, override)
    return build_config(tree, str(path), problems, world_size=world_size, check_files=check_files)


def build_config(
    tree: Tree,
    source: str = "config",
    problems: Iterable[Problem] = (),
    *,
    world_size: int | None = None,
    check_files: bool = False,
) -> Config:
    """Check a tree as JSON gives it (also a checkpoint's). Raises ConfigError with every problem."""
    found = list(problems)
    config = _validate(tree, found)
    broken = {key for problem in found for key in (problem.key, problem.meant) if key}
    if config is not None:
        found += check_rules(config, broken)
        if world_size is not None:
            found += check_world(config, world_size, broken)
        if check_files:
            found += missing_files(config, broken)
    raise_problems(source, found)
    assert config is not None, "a tree that cannot be repaired has problems"
    return config


def _validate(tree: Tree, found: list[Problem]) -> Config | None:
    """The typed tree; what is wrong with it goes to `found`.

    Where something is wrong the result has defaults or examples in its place, so that the rules between the
    other keys can still be checked; None where even that fails.
    """
    tree = {key: value for key, value in tree.items() if key != "$schema"}
    if isinstance(tree.get("deepspeed"), dict):
        found += check_keys(tree["deepspeed"])
        tree["deepspeed"] = _sound_deepspeed(tree["deepspeed"], {problem.key for problem in found})
    tree = _without_nulls(tree, Config)
    for attempt in range(4):
        try:
            # Through JSON, because there pydantic's strict mode takes an array for a tuple.
            return Config.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            if attempt == 0:
                found += dict.fromkeys(_describe(details, tree) for details in error.errors())
            for details in error.errors():
                _repair(tree, [str(part) for part in details["loc"]])
    return None


def _sound_deepspeed(section: Tree, broken: set[str], path: str = "deepspeed") -> Tree:
    """`section` without its nulls and the keys in `broken`."""
    sound: Tree = {}
    for key, value in section.items():
        here = f"{path}.{key}"
        if value is not None and here not in broken:
            sound[key] = _sound_deepspeed(value, broken, here) if isinstance(value, dict) else value
    return sound


def _without_nulls(tree: Tree, section: type[BaseModel]) -> Tree:
    """A copy of `tree` without known keys that are null: null is the default."""
    result: Tree = {}
    for key, value in tree.items():
        inner = section_at([key], section)
        if isinstance(value, dict) and inner is not None:
            value = _without_nulls(value, inner)
        if value is not None or key not in section.model_fields:
            result[key] = value
    return result


def _repair(tree: Tree, names: list[str]) -> None:
    """Put an example or the default where the error at `names` is; remove what is unknown."""
    node = tree
    section: type[BaseModel] = Config
    for name in names:
        field = section.model_fields.get(name)
        inner = section_at([name], section)
        if inner is None or not isinstance(node.get(name), dict):
            node.pop(name, None)
            if field is not None and field.is_required():
                node[name] = {} if inner else field.examples[0] if field.examples else None
            return
        node, section = node[name], inner


def read_json(path: str | Path) -> Tree:
    """The JSON object in a file. Raises ConfigError naming file, line and column."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_distinct)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except _RepeatedKey as error:
        raise ConfigError(f'{path}: not valid JSON: key "{error}" appears twice in one object') from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one JSON object, not {type(value).__name__}")
    return value


class _RepeatedKey(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> Tree:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return result


def apply_override(tree: Tree, override: str) -> list[Problem]:
    """Apply one `a.b=value` to `tree` in place; the value is JSON, or else a plain string."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        return [Problem("", f"--set {override}: write it as KEY.PATH=VALUE, for example train.steps=100")]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    if isinstance(value, int | float) and _takes_text(parents, last):
        value = text
    node = tree
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        if not isinstance(node[name], dict):
            return [Problem(path, f"{'.'.join(parents[: depth + 1])} is a value, it has no keys of its own")]
        node = node[name]
    node[last] = value
    return []


def _takes_text(parents: list[str], name: str) -> bool:
    section = section_at(parents)
    field = section.model_fields.get(name) if section else None
    return field is not None and (field.annotation is str or _is_union_with(field.annotation, str))


def _is_union_with(annotation: Any, member: type) -> bool:
    return isinstance(annotation, UnionType) and member in get_args(annotation)


def merge_deepspeed(tree: Tree, extra: Tree, source: str) -> list[Problem]:
    """Merge a DeepSpeed file into `tree["deepspeed"]` in place; contradicting values are a problem."""
    section = tree.setdefault("deepspeed", {})
    if not isinstance(section, dict):
        return []  # reported when the tree is validated
    return _merge(section, extra, "deepspeed", source)


def _merge(into: Tree, extra: Tree, path: str, source: str) -> list[Problem]:
    problems = []
    for key, value in extra.items():
        here = f"{path}.{key}"
        if key not in into:
            into[key] = copy.deepcopy(value)
        elif isinstance(value, dict) and isinstance(into[key], dict):
            problems += _merge(into[key], value, here, source)
        elif into[key] == "auto":
            into[key] = value
        elif value not in ("auto", into[key]):
            ours, theirs = json.dumps(into[key]), json.dumps(value)
            problems.append(Problem(here, f"is {ours} here and {theirs} in {source}; remove one of the two"))
    return problems


def _describe(details: ErrorDetails, tree: Tree) -> Problem:
    """One of pydantic's errors in our words."""
    names = [str(part) for part in details["loc"]]
    parent = section_at(names[:-1])
    if names[0] == "data" and len(names) > 2:  # pydantic reports every branch of the union apart
        path, value = ".".join(names[:2]), json.dumps(tree["data"][names[1]])
        return Problem(
            path, f"must be a prefix, a list of prefixes or a list of [weight, prefix], not {value}"
        )
    path = ".".join(names)
    kind, context = details["type"], details.get("ctx", {})
    shown = json.dumps(details["input"], default=str)
    if kind == "extra_forbidden" and parent is not None:
        return unknown_key(path, parent.model_fields)
    if kind == "missing" and parent is not None:
        return Problem(path, f"is required ({parent.model_fields[names[-1]].description})")
    if kind == "literal_error" and parent is not None:
        legal = choices(parent, names[-1])
        match = closest(str(details["input"]), legal)
        meant = f"; did you mean {match}?" if match else ""
        return Problem(path, f"{shown} is not one of {', '.join(legal)}{meant}")
    for bound, words in {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}.items():
        if bound in context:
            return Problem(path, f"must be {words} {context[bound]}, not {shown}")
    if kind in _TYPES:
        return Problem(path, f"must be {_TYPES[kind]}, not {shown}")
    return Problem(path, f"{details['msg'].removeprefix('Input ')}, not {shown}")


# pydantic's kinds of type errors in our words
_TYPES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "model_type": "an object",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "tuple_type": "a list",
}


def section_at(names: Iterable[str], section: type[BaseModel] = Config) -> type[BaseModel] | None:
    """The section a path of keys leads to from `section`, or None where it leads to a plain value."""
    for name in names:
        field = section.model_fields.get(name)
        types = (field.annotation, *get_args(field.annotation)) if field else ()
        found = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if found is None:
            return None
        section = found
    return section
