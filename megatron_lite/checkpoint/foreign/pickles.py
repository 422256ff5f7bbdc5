"""What other systems' pickles say, without running any code that is in them.

A pickle names classes and functions and has them called. Here each of those names stands for `Opaque`, which keeps
what it is given and does nothing, but for a few of Python's own that can do no harm. So settings and tables of
contents are read without the packages that wrote them, and a pickle made to harm has no effect.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError


class Opaque:
    """Stands for an object of a class that is not loaded: its attributes where it has some, its arguments."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __new__(cls, *arguments: Any, **named: Any) -> Opaque:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = state[1]  # attributes in slots
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})
        else:
            self.state = state

    # What a pickle does to lists, sets and dictionaries of unknown classes.
    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


_HARMLESS: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return _HARMLESS.get((module, name), Opaque)

    def persistent_load(self, reference: Any) -> None:
        """The data of a tensor: left where it is."""


def read_pickle(path: Path) -> Any:
    """The objects of a pickle file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return _unpickle(path.read_bytes())
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        raise CheckpointError(
            f"{path} cannot be read ({error or type(error).__name__}); restore it"
        ) from error


def read_saved(path: Path) -> Any:
    """The objects of a file of torch.save (of torch 1.6 or later), with None for the data of tensors.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl")
            return _unpickle(archive.read(name))
    except Exception as error:  # as above
        reason = "it holds no data.pkl" if isinstance(error, StopIteration) else error or type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}); is it of torch.save?") from error


def _unpickle(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def load_tensor(path: Path, data: io.BytesIO | None = None) -> Any:
    """A tensor, or plain containers of them, from a file of torch.save, mapped; or from `data`, a part of the file.

    Raises:
        CheckpointError: it is damaged, or holds what only unpickling code of others would give.
    """
    try:
        if data is None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and others
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as tensors ({reason}); restore it") from error
