"""The reference compiled by torch.compile, each operation for itself, when it is first called."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lite.ops import reference
from megatron_lite.ops.backends import Needs


def lacks(group: str, needs: Needs) -> Iterator[str]:
    if needs.device == "cuda" and importlib.util.find_spec("triton") is None:
        yield "triton is not installed"
    if needs.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        yield "there is no C++ compiler"
    if group == "dropout" or (group == "attention" and needs.attention_dropout):
        yield "it would compile anew for every seed of dropout"


def load(operations: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """The functions of some operations."""
    return {name: torch.compile(getattr(reference, name)) for name in operations}
