"""Batches for one data-parallel rank, in an order that does not depend on the number of ranks.

Step t takes samples t*G .. t*G + G - 1 of the dataset (G the global batch); micro-batch m of rank r is
samples t*G + (m*data_size + r)*b onward (b the micro batch). The position is a number of samples, so a run
goes on exactly where it stopped, also with other batch sizes or another number of ranks.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data import _index
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import SampleDataset, reader_of

if TYPE_CHECKING:  # settings take 0.1 s to load, which tools over corpora do not need
    from megatron_lite.config import Config

_STEPS_AHEAD = 2
_Number = TypeVar("_Number", np.int64, np.int32, np.float32)


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
    """[b, S] number of the document within the row, -1 for padding (with reset_attention_mask; else None: all one)"""

    def rows(self, which: slice) -> Batch:
        """Some samples of it."""
        positions = None if self.position_ids is None else self.position_ids[which]
        segments = None if self.segments is None else self.segments[which]
        return Batch(self.tokens[which], self.labels[which], self.loss_mask[which], positions, segments)


class _Blocks:
    """Blocks of memory that are used again once the arrays in them are gone.

    Memory that is new costs a page fault every few kilobytes, which takes longer than copying the tokens.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> NDArray[np.uint8]:
        """[size] bytes of any content."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < size:
            memory = mmap.mmap(-1, size)
            with contextlib.suppress(AttributeError, OSError):  # only Linux has them, and not every one
                memory.madvise(mmap.MADV_HUGEPAGE)
        # Every view of this array refers to it, since what it refers to in turn is not an array.
        block = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(block, self._free.append, memory).atexit = False
        return block


class DataLoader:
    """This rank's share of each global batch; see the module for the order.

    eod_id: the end-of-document token; it belongs to the document it ends
    eod_mask_loss: no loss where the input is eod
    reset_position_ids: positions restart after eod
    reset_attention_mask: give `segments`, so that attention stays within a document
    vocab_size: where given, ids at or beyond it are an error (data of another tokenizer), not a crash in the
        model
    consumed_samples: where to start, in samples of the run
    first_sample: which sample of the run is number 0 of the dataset (a run that went on with other data)
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
        first_sample: int = 0,
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
        self._consumed, self._first = consumed_samples, first_sample
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[Future[list[Batch]]] = deque()
        self._blocks = _Blocks()

    @property
    def consumed_samples(self) -> int:
        """Samples of the run that all ranks together have been given."""
        return self._consumed

    @property
    def remaining_steps(self) -> int:
        """Whole global batches that are left."""
        return max(0, self._end - self._consumed) // self._global

    @property
    def _end(self) -> int:
        return self._first + len(self.dataset)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, and move on.

        Raises DatasetError past the end of the dataset, and whatever reading raised; the position stays then.
        """
        if self.remaining_steps == 0:
            raise DatasetError(
                f"the dataset ends at sample {self._end:,}: a global batch of {self._global:,} from "
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
        """This rank's part of a step in one block of memory, filled by one call where the dataset allows."""
        starts = range(first + self._rank * self._micro, first + self._global, self._micro * self._size)
        whole = self._read([range(start, start + self._micro) for start in starts])
        pieces = (slice(begin, begin + self._micro) for begin in range(0, len(whole.tokens), self._micro))
        return [whole.rows(piece) for piece in pieces]

    def _read(self, samples: list[range]) -> Batch:
        eod = -1 if self._eod is None else self._eod
        numbers = [range(part.start - self._first, part.stop - self._first) for part in samples]
        reader = reader_of(self.dataset)
        if reader is not None:
            together = np.concatenate([np.arange(part.start, part.stop) for part in numbers])
            batch = self._empty(len(together), reader.length)
            try:
                low, high = reader.read(together, *batch, eod=eod, mask_loss=self._mask_eod)
            except IndexError as error:
                raise DatasetError(f"samples {samples[0].start:,} to {samples[-1].stop:,}: {error}") from None
        else:
            rows = np.concatenate([self.dataset.batch(part) for part in numbers])
            batch = self._empty(len(rows), rows.shape[1] - 1)
            low, high = int(rows.min()), int(rows.max())
            batch.tokens[:], batch.labels[:] = rows[:, :-1], rows[:, 1:]
            _index.mark_documents(batch.tokens, *batch[2:], eod=eod, mask_loss=self._mask_eod)
        if self._vocab_size is not None and not 0 <= low <= high < self._vocab_size:
            raise DatasetError(
                f"token ids from {low} to {high} in samples {samples[0].start:,} to {samples[-1].stop:,}, but the "
                f"vocabulary has {self._vocab_size:,}: the data was written with another tokenizer"
            )
        return batch

    def _empty(self, samples: int, length: int) -> Batch:
        """The arrays of a step, in a block that no batch uses any more."""
        count = samples * length
        block = self._blocks.take(count * (20 + 8 * self._restart + 4 * self._segment))
        place = 0

        def array(kind: type[_Number]) -> NDArray[_Number]:
            nonlocal place
            made: NDArray[_Number] = np.ndarray((samples, length), kind, block, place)
            place += made.nbytes
            return made

        # Those of eight bytes first, so that each begins at a multiple of its numbers' size.
        tokens, labels = array(np.int64), array(np.int64)
        positions = array(np.int64) if self._restart else None
        return Batch(tokens, labels, array(np.float32), positions, array(np.int32) if self._segment else None)


def make_loader(
    config: Config,
    dataset: SampleDataset,
    eod_id: int | None,
    data_rank: int = 0,
    data_size: int = 1,
    consumed_samples: int = 0,
    first_sample: int = 0,
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
        first_sample=first_sample,
        num_workers=num_workers,
    )
