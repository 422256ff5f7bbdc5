"""Small indexed datasets for the tests of this folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import IndexedDatasetWriter

MakePrefix = Callable[..., str]


@pytest.fixture
def make_prefix(tmp_path: Path) -> MakePrefix:
    """make_prefix(lengths, name, tokens): a pair with sequences of these lengths; ids count 0, 1, 2, … by default."""

    def make(lengths: Sequence[int], name: str = "data", tokens: np.ndarray | None = None) -> str:
        ids = np.arange(sum(lengths), dtype=np.int32) if tokens is None else tokens
        prefix = tmp_path / name
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            end = 0
            for length in lengths:
                writer.add_sequence(ids[end : end + length])
                writer.end_document()
                end += length
        return str(prefix)

    return make
