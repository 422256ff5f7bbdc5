"""Runs test files where pytest is not installed: the few parts of it that the GPU tests use.

Not here: rewriting of asserts, plugins, and fixtures of other files but tmp_path and tmp_path_factory.
"""

import importlib
import importlib.util
import inspect
import itertools
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A test that cannot run here."""


class Mark:
    """`pytest.mark.NAME`, with arguments or without; as a decorator it is added to the function's marks."""

    def __init__(self, name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and inspect.isfunction(args[0]):
            args[0].pytestmark = [*getattr(args[0], "pytestmark", []), self]
            return args[0]
        return Mark(self.name, args, kwargs)


class Param:
    """`pytest.param`: one case of a parametrization."""

    def __init__(self, *values: Any, marks: Any = (), id: str | None = None) -> None:
        self.values, self.marks = values, _listed(marks)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


class _Approx:
    def __init__(self, expected: Any, rel: float = 1e-6, abs: float = 1e-12) -> None:
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, found: object) -> bool:
        if isinstance(self.expected, Sequence):
            pairs = zip(self.expected, found, strict=True)  # type: ignore[call-overload]
            return all(_Approx(e, self.rel, self.abs) == f for e, f in pairs)
        return abs(found - self.expected) <= max(self.rel * abs(self.expected), self.abs)  # type: ignore[operator]


@contextmanager
def _raises(kind: Any, match: str | None = None) -> Iterator[types.SimpleNamespace]:
    import re

    info = types.SimpleNamespace(value=None)
    try:
        yield info
    except kind as error:
        info.value = error
        assert match is None or re.search(match, str(error)), f"{error!s} does not match {match}"
    else:
        raise AssertionError(f"did not raise {kind}")


def _skip(reason: str = "") -> None:
    raise Skipped(reason)


def _import_or_skip(name: str) -> types.ModuleType:
    if importlib.util.find_spec(name) is None:
        raise Skipped(f"no {name}")
    return importlib.import_module(name)


def _fixture(function: Any = None, **about: Any) -> Any:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.is_a_fixture = True  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def install() -> None:
    """Makes `import pytest` give this module's parts."""
    module: Any = types.ModuleType("pytest")
    module.mark, module.param, module.fixture, module.approx = _Marks(), Param, _fixture, _Approx
    module.raises, module.skip, module.importorskip = _raises, _skip, _import_or_skip
    module.FixtureRequest, module.TempPathFactory, module.MonkeyPatch = object, object, object
    sys.modules["pytest"] = module


class _Folders:
    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name))


class File:
    """One test file: its module, and values of its fixtures, each made once for the file."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.values: dict[str, Any] = {"tmp_path_factory": _Folders()}
        self.open: list[Iterator[Any]] = []

    def tests(self) -> Iterator[tuple[str, Callable[..., Any], list[Mark]]]:
        shared = _listed(getattr(self.module, "pytestmark", []))
        for name, function in list(vars(self.module).items()):
            if name.startswith("test_") and inspect.isfunction(function):
                yield name, function, [*shared, *getattr(function, "pytestmark", [])]

    def argument(self, name: str) -> Any:
        if name == "tmp_path":
            return _Folders().mktemp("test")
        if name not in self.values:
            fixture = getattr(self.module, name, None)
            if not hasattr(fixture, "is_a_fixture"):
                raise Skipped(f"needs pytest, for the fixture {name}")
            made = fixture(**{n: self.argument(n) for n in inspect.signature(fixture).parameters})  # type: ignore[misc]
            if inspect.isgenerator(made):
                self.open.append(made)
                made = next(made)
            self.values[name] = made
        return self.values[name]

    def close(self) -> None:
        for generator in reversed(self.open):
            next(generator, None)


def _listed(marks: Any) -> list[Mark]:
    return list(marks) if isinstance(marks, list | tuple) else [marks]


def cases(marks: Sequence[Mark]) -> Iterator[tuple[dict[str, Any], list[Mark]]]:
    """The arguments of each case, the product of all parametrizations, and the marks it has."""
    axes = []
    for mark in marks:
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            axis = []
            for value in values:
                row = value.values if isinstance(value, Param) else value if len(names) > 1 else (value,)
                own = value.marks if isinstance(value, Param) else []
                axis.append((dict(zip(names, row, strict=True)), own))
            axes.append(axis)
    for chosen in itertools.product(*axes):
        merged = {name: value for arguments, _ in chosen for name, value in arguments.items()}
        yield merged, [*marks, *(mark for _, own in chosen for mark in own)]


def why_not(marks: Sequence[Mark], wanted: str) -> str | None:
    """Why a case does not run here; "" where it lacks the mark that is wanted."""
    if all(mark.name != wanted for mark in marks):
        return ""
    for mark in marks:
        if mark.name == "skip" or (mark.name == "skipif" and mark.args[0]):
            return str((mark.kwargs or {}).get("reason", "skipped"))
    return None


def run(names: Sequence[str], wanted: str, lacking: str | None = None) -> int:
    """Runs the cases marked `wanted` of some modules, prints a line a test, and returns how many failed.

    Args:
        lacking: why none of them can run here; None: they can.
    """
    install()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in names:
        try:
            file = File(importlib.import_module(name))
        except Exception as error:
            missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
            outside = missing and missing.partition(".")[0] not in ("megatron_lite", "tests", "csrc")
            outcome = "skipped" if outside or isinstance(error, Skipped) else "failed"
            print(f"{name}: 1 {outcome}\n{error if outcome == 'skipped' else traceback.format_exc()}")
            counts[outcome] += 1
            continue
        for test, function, marks in file.tests():
            begun, found, reasons = time.perf_counter(), dict.fromkeys(counts, 0), []
            for arguments, own in cases(marks):
                reason = why_not(own, wanted)
                if reason == "":
                    continue
                outcome, said = _one(file, function, arguments, reason or lacking)
                found[outcome] += 1
                if said and said not in reasons:
                    reasons.append(said)
            shown = ", ".join(f"{count} {outcome}" for outcome, count in found.items() if count)
            if shown:
                print(f"{name}.{test}: {shown} ({time.perf_counter() - begun:.1f} s)", flush=True)
                print("".join(f"    {reason}\n" for reason in reasons), end="")
            counts = {outcome: counts[outcome] + found[outcome] for outcome in counts}
        file.close()
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["failed"]


def _one(
    file: File, function: Callable[..., Any], arguments: dict[str, Any], reason: str | None
) -> tuple[str, str]:
    try:
        if reason is not None:
            raise Skipped(reason)
        others = [n for n in inspect.signature(function).parameters if n not in arguments]
        function(**arguments, **{name: file.argument(name) for name in others})
    except Skipped as skipped:
        return "skipped", str(skipped)
    except Exception:
        return "failed", f"{arguments}\n{traceback.format_exc()}"
    return "passed", ""
