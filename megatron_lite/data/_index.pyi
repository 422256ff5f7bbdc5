from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def fill_starts(
    rows: NDArray[Any],
    lengths: NDArray[np.int32],
    documents: NDArray[Any],
    spans: NDArray[np.int32],
    position: int,
    first: int,
    stride: int,
) -> None: ...
def shuffle(values: NDArray[Any], seed: int, epoch: int, stream: int) -> None: ...

class LegacyRandom:
    def __init__(self, seed: int) -> None: ...
    def shuffle(self, values: NDArray[Any]) -> None: ...

def build_blend_index(
    weights: NDArray[np.float64], size: int, limits: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
def pack(
    lengths: NDArray[np.int32], documents: NDArray[Any], spans: NDArray[np.int32], capacity: int
) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[Any]]: ...
def count_cut(
    lengths: NDArray[np.int32], documents: NDArray[Any], spans: NDArray[np.int32], length: int
) -> tuple[int, int]: ...
def mark_documents(
    tokens: NDArray[np.int64],
    mask: NDArray[np.float32] | None = None,
    positions: NDArray[np.int64] | None = None,
    segments: NDArray[np.int32] | None = None,
    eod: int = -1,
    mask_loss: bool = False,
) -> None: ...

class Samples:
    def __len__(self) -> int: ...
    @property
    def length(self) -> int: ...
    def read(
        self,
        numbers: NDArray[np.int64],
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        mask: NDArray[np.float32] | None = None,
        positions: NDArray[np.int64] | None = None,
        segments: NDArray[np.int32] | None = None,
        eod: int = -1,
        mask_loss: bool = False,
    ) -> tuple[int, int]: ...

class IndexedSamples(Samples):
    def __init__(
        self,
        ids: NDArray[Any],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int32],
        documents: NDArray[Any],
        spans: NDArray[np.int32],
        starts: NDArray[Any],
        length: int,
        packed: bool,
        first: int,
    ) -> None: ...

class BlendedSamples(Samples):
    def __init__(
        self, members: Sequence[Samples], dataset: NDArray[np.int16], sample: NDArray[np.int64]
    ) -> None: ...
