"""Many texts at once to one array of ids: what corpora are encoded by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.tokenizers.base import Tokenizer


def encode_flat(
    tokenizer: Tokenizer, texts: Sequence[str], eod_id: int | None = None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(ids of all texts back to back, [texts] how many each has).

    eod_id: appended to every text that has ids, and counted; None: nothing is
    """
    own = getattr(tokenizer, "encode_flat", None)  # gigatoken's
    if own is not None:
        ids, lengths = own(texts, eod_id)
        return ids, lengths
    return flat_of(tokenizer.encode_batch(texts), eod_id)


def flat_of(encoded: list[list[int]], eod_id: int | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """`encode_flat` of texts whose ids are known. The lists are changed."""
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    if eod_id is not None:
        for ids in encoded:
            if ids:
                ids.append(eod_id)
        lengths += lengths > 0
    return np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum())), lengths
