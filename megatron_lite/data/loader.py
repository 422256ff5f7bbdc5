"""Batches for one data-parallel rank, in an order that does not depend on the number of ranks.

Step t takes samples t*G .. t*G + G - 1 of the dataset (G the global batch); micro-batch m of rank r is
samples t*G + (m*data_size + r)*b onward (b the micro batch). The position is a number of samples, so a run
goes on exactly where it stopped, also with other batch sizes or another number of ranks.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.config import Config
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import SampleDataset

_STEPS_AHEAD = 2


class Batch(NamedTuple):
    """One micro-batch: b samples of S tokens."""

    tokens: NDArray[np.int64]
    """[b, S] inputs"""
    labels: NDArray[np.int64]
    """[b, S] the token after each input"""
    loss_mask: NDArray[np.float32]
    """[b, S] 1 where the loss counts"""
    position_ids: NDArray[np.int64] | None
    """[b, S] position in its document (with reset_position_ids; else None: 0 .. S - 1)"""
    segments: NDArray[np.int32] | None
    """[b, S] number of the document within the row (with reset_attention_mask; else None: all one)"""


class DataLoader:
    """This rank's share of each global batch; see the module for the order.

    eod_id: the end-of-document token; it belongs to the document it ends
    eod_mask_loss: no loss where the input is eod
    reset_position_ids: positions restart after eod
    reset_attention_mask: give `segments`, so that attention stays within a document
    vocab_size: where given, ids at or beyond it are an error (data of another tokenizer), not a crash in the
        model
    consumed_samples: where to start, in samples of the whole dataset
    num_workers: threads that read ahead; 0 reads in `next_step` itself. Their exceptions surface in
        `next_step`.

    Raises ValueError for sizes that do not divide or a flag without eod_id.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        *,
        eod_id: int | None = None,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        vocab_size: int | None = None,
        consumed_samples: int = 0,
        num_workers: int = 1,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_size):
            raise ValueError(
                f"train.global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x {data_size} data-parallel ranks"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data-parallel rank {data_rank} of {data_size}")
        if eod_id is None and (eod_mask_loss or reset_position_ids or reset_attention_mask):
            raise ValueError(
                "data.eod_mask_loss, reset_position_ids and reset_attention_mask need a tokenizer with an "
                "end-of-document token"
            )
        self.dataset = dataset
        self._micro, self._global = micro_batch_size, global_batch_size
        self._rank, self._size = data_rank, data_size
        self._eod = eod_id
        self._mask_eod, self._restart, self._segment = eod_mask_loss, reset_position_ids, reset_attention_mask
        self._vocab_size = vocab_size
        self._consumed = consumed_samples
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[Future[list[Batch]]] = deque()

    @property
    def consumed_samples(self) -> int:
        """Samples of the dataset that all ranks together have been given."""
        return self._consumed

    @property
    def remaining_steps(self) -> int:
        """Whole global batches that are left."""
        return max(0, len(self.dataset) - self._consumed) // self._global

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, and move on.

        Raises DatasetError past the end of the dataset, and whatever reading raised; the position stays then.
        """
        if self.remaining_steps == 0:
            raise DatasetError(
                f"the dataset ends at sample {len(self.dataset):,}: a global batch of {self._global:,} from "
                f"sample {self._consumed:,} on goes past it; build it for more samples"
            )
        if self._pool is None:
            batches = self._read_step(self._consumed)
        else:
            self._read_ahead(self._pool)
            try:
                batches = self._ahead[0].result()
            except BaseException:
                self._ahead.clear()  # so that trying again reads again
                raise
            self._ahead.popleft()
        self._consumed += self._global
        if self._pool is not None:
            self._read_ahead(self._pool)
        return batches

    def close(self) -> None:
        """End the threads. A loader that is closed gives no more steps."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        while len(self._ahead) < min(_STEPS_AHEAD, self.remaining_steps):
            self._ahead.append(pool.submit(self._read_step, self._consumed + len(self._ahead) * self._global))

    def _read_step(self, first: int) -> list[Batch]:
        starts = range(first + self._rank * self._micro, first + self._global, self._micro * self._size)
        return [self._batch(range(start, start + self._micro)) for start in starts]

    def _batch(self, samples: range) -> Batch:
        rows = self.dataset.batch(samples)
        if (
            self._vocab_size is not None
            and rows.size
            and not 0 <= rows.min() <= rows.max() < self._vocab_size
        ):
            raise DatasetError(
                f"token ids from {rows.min()} to {rows.max()} in samples {samples.start:,} to "
                f"{samples.stop:,}, but the vocabulary has {self._vocab_size:,}: the data was "
                "written with another tokenizer"
            )
        tokens, labels = rows[:, :-1], rows[:, 1:]
        ends = tokens == self._eod if self._eod is not None else np.zeros(tokens.shape, dtype=bool)
        loss_mask = np.ones(tokens.shape, dtype=np.float32)
        if self._mask_eod:
            loss_mask[ends] = 0.0
        return Batch(
            np.ascontiguousarray(tokens),
            np.ascontiguousarray(labels),
            loss_mask,
            restarted_positions(ends) if self._restart else None,
            segment_numbers(ends) if self._segment else None,
        )


def make_loader(
    config: Config,
    dataset: SampleDataset,
    eod_id: int | None,
    data_rank: int = 0,
    data_size: int = 1,
    consumed_samples: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """The loader that `config` describes: its batch sizes, masks and vocabulary. Raises as `DataLoader` does.

    eod_id: of data.tokenizer; None: there is none
    """
    train, data = config.train, config.data
    return DataLoader(
        dataset,
        train.micro_batch_size,
        train.global_batch_size,
        data_rank,
        data_size,
        eod_id=eod_id,
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        vocab_size=config.model.vocab_size,
        consumed_samples=consumed_samples,
        num_workers=num_workers,
    )


def restarted_positions(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[b, S] positions that start again at 0 after each True of `ends` [b, S]."""
    positions = np.arange(ends.shape[1], dtype=np.int64)
    starts = np.zeros(ends.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], positions[1:], 0)
    return positions - np.maximum.accumulate(starts, axis=1)


def segment_numbers(ends: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[b, S] numbers 0, 1, … that go up after each True of `ends` [b, S]."""
    segments = np.zeros(ends.shape, dtype=np.int32)
    np.cumsum(ends[:, :-1], axis=1, out=segments[:, 1:])
    return segments
