"""From a JSON file, `--set` overrides and a DeepSpeed file to a checked `Config`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .base import choices
from .errors import ConfigError, Problem, closest, raise_problems, unknown_key
from .tree import Config

Tree = dict[str, Any]


def load_config(
    path: str | Path, overrides: Iterable[str] = (), deepspeed_config: str | Path | None = None
) -> Config:
    """Read `path`, merge a DeepSpeed JSON file into its deepspeed section, apply `a.b=value`, check.

    Raises ConfigError with every problem found, one line each.
    """
    tree = read_json(path)
    problems: list[Problem] = []
    if deepspeed_config is not None:
        problems += merge_deepspeed(tree, read_json(deepspeed_config), str(deepspeed_config))
    for override in overrides:
        problems += apply_override(tree, override)
    return build_config(tree, str(path), problems)


def build_config(tree: Mapping[str, Any], source: str = "config", problems: Iterable[Problem] = ()) -> Config:
    """Check a tree as JSON gives it (also a checkpoint's). Raises ConfigError with every problem."""
    found = list(problems)
    tree = {key: value for key, value in tree.items() if key != "$schema"}
    config = None
    try:
        # Through JSON, because there pydantic's strict mode takes an array for a tuple.
        config = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        found += [_describe(details) for details in error.errors()]
    raise_problems(source, found)
    assert config is not None
    return config


def read_json(path: str | Path) -> Tree:
    """The JSON object in a file. Raises ConfigError naming file, line and column."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one JSON object, not {type(value).__name__}")
    return value


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
    node = tree
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        if not isinstance(node[name], dict):
            return [Problem(path, f"{'.'.join(parents[: depth + 1])} is a value, it has no keys of its own")]
        node = node[name]
    node[last] = value
    return []


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
        elif into[key] != value:
            ours, theirs = json.dumps(into[key]), json.dumps(value)
            problems.append(Problem(here, f"is {ours} here and {theirs} in {source}; remove one of the two"))
    return problems


def _describe(details: ErrorDetails) -> Problem:
    """One of pydantic's errors in our words."""
    names = [str(part) for part in details["loc"]]
    path = ".".join(names)
    parent = section_at(names[:-1])
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    shown = json.dumps(value, default=str)
    if kind == "extra_forbidden" and parent is not None:
        return unknown_key(path, parent.model_fields)
    if kind == "missing" and parent is not None:
        return Problem(path, f"is required ({parent.model_fields[names[-1]].description})")
    if kind == "literal_error" and parent is not None:
        legal = choices(parent, names[-1])
        match = closest(str(value), legal)
        return Problem(
            path, f"{shown} is not one of {', '.join(legal)}" + (f"; did you mean {match}?" if match else "")
        )
    for bound, words in {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}.items():
        if bound in context:
            return Problem(path, f"must be {words} {context[bound]}, not {shown}")
    message = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Problem(path, f"must be {message}, not {shown}")


def section_at(names: Iterable[str]) -> type[BaseModel] | None:
    """The section a path of keys leads to, or None where it leads to a plain value."""
    section: type[BaseModel] = Config
    for name in names:
        field = section.model_fields.get(name)
        types = (field.annotation, *get_args(field.annotation)) if field else ()
        found = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if found is None:
            return None
        section = found
    return section
