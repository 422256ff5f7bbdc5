from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_sample_index(
    lengths: NDArray[np.int32], documents: NDArray[Any], first: int, stride: int, count: int
) -> NDArray[Any]: ...
def shuffle(values: NDArray[Any], seed: int, epoch: int, stream: int) -> None: ...
def build_blend_index(
    weights: NDArray[np.float64], size: int, limits: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
