"""Real English that every machine with Python has: the documentation inside its own standard library."""

from __future__ import annotations

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_lite.corpus.clean import clean_text
from megatron_lite.corpus.files import writing

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
_MIN_CHARACTERS = 80  # shorter docstrings ("Return self.") say little


class DocsStats(NamedTuple):
    documents: int
    duplicates: int
    characters: int


def write_python_docs(path: str | Path, library: str | Path | None = None) -> DocsStats:
    """Write a JSONL file of {"text", "source"} lines: cleaned docstrings and language topics, each text once.

    library: folder of Python sources; None: the running Python's standard library. The same sources give the
        same
        bytes.
    """
    root = Path(library) if library is not None else Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    duplicates = characters = 0
    with writing(path) as file:
        for source, text in python_docs(root):
            if text in seen:
                duplicates += 1
                continue
            seen.add(text)
            characters += len(text)
            file.write((json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n").encode())
    return DocsStats(len(seen), duplicates, characters)


def python_docs(root: Path) -> Iterator[tuple[str, str]]:
    """(source, cleaned text) of every docstring below `root` and every topic of pydoc_data, in path order.

    Sources are parsed, never imported; a file that does not parse is passed over.
    """
    for path in _sources(root):
        source = path.relative_to(root).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        texts = _topics(tree) if source == "pydoc_data/topics.py" else _docstrings(tree)
        for name, text in texts:
            cleaned = clean_text(text, _MIN_CHARACTERS)
            if cleaned is not None:
                yield f"{source}:{name}" if name else source, cleaned


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".py"))


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", ""), text


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of the dictionary literal `topics`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield str(name), str(text)
