"""How far an encoding is: a bar on a terminal, lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lite.corpus.encode import EncodeStats

logger = logging.getLogger(__name__)

_SECONDS = 10.0  # between lines of the log


class Progress:
    """log_interval: documents between lines of the log; None: by time
    bar: whether there is a terminal to draw on; None: where standard error is one"""

    def __init__(self, log_interval: int | None = None, bar: bool | None = None) -> None:
        self._interval = log_interval
        self._wanted = sys.stderr.isatty() if bar is None else bar
        self._bar: Any = None

    def start(self, total: int | None, stats: EncodeStats) -> None:
        """total: bytes of all input files, None where that is not known; stats: of the part done before"""
        self._total = total
        self._begin = self._said = time.monotonic()
        self._bytes, self._tokens = stats.input_bytes, _tokens(stats)
        self._documents = stats.read
        if self._wanted:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)

    def update(self, position: int, stats: EncodeStats) -> None:
        """position: bytes of the input files that are done"""
        now = time.monotonic()
        seconds = max(now - self._begin, 1e-9)
        rate = (stats.input_bytes - self._bytes) / seconds
        rates = f"{rate / 1e6:.1f} MB/s, {(_tokens(stats) - self._tokens) / seconds / 1e6:.2f}M tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(max(position - self._bar.n, 0))
            return
        if self._interval is not None:
            due = stats.read - self._documents >= self._interval
        else:
            due = now - self._said >= _SECONDS
        if due:
            self._said, self._documents = now, stats.read
            done = position / self._total if self._total else 0.0
            left = f", {seconds / done - seconds:.0f} s left" if 0 < done < 1 and not self._bytes else ""
            logger.info(
                "%s documents, %.1f MB (%s%s)", f"{stats.read:,}", stats.input_bytes / 1e6, rates, left
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _tokens(stats: EncodeStats) -> int:
    return sum(counts.tokens for counts in stats.keys.values())
