"""Documents that are nearly like an earlier one: MinHash and locality-sensitive hashing (Broder 1997).

The similarity of two documents is the Jaccard index of their sets of word n-grams. A signature is the lowest value of
each of bands × rows random permutations over the set; two signatures agree in a place with the chance of the
similarity s. Documents that agree in all rows of any band are candidates: with a chance of 1 − (1 − s^rows)^bands, the
S-curve, which rises most steeply around (1/bands)^(1/rows). Candidates of candidates make a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.corpus import _text
from megatron_lite.corpus.dedup.runs import Keys, Run, RunWriter, merge, remove
from megatron_lite.corpus.dedup.state import Corpus, Task, Texts, with_bases
from megatron_lite.corpus.dedup.words import table
from megatron_lite.corpus.files import CorpusError

_BATCH_BYTES = 1 << 20  # of text, whose signatures are made by one call
_PAIRS = 1 << 14  # signatures compared at once


class MinHash(NamedTuple):
    """Of each cluster of similar documents one stays.

    ngram: words
    bands, rows: with the defaults, those of FineWeb, two documents of similarity 0.75 are found with a chance of 0.77,
        of 0.8 with 0.92 and of 0.9 with 0.9996
    verify: a document is dropped only where its signature and that of a document that stays agree in at least this
        share of their places; 0: the first of each cluster stays alone, however long the chain that leads to it
    seed: of the permutations

    Documents without words are never dropped.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    verify: float = 0.0
    seed: int = 1

    def chance(self, similarity: float) -> float:
        """That two documents are candidates: the S-curve."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands

    def permutations(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """(odd factors, addends), one of each for every place of a signature."""
        # A counter through a mixing step, which is the same for ever; numpy's Generator does not promise that.
        draws = _mixed(np.arange(2 * self.bands * self.rows, dtype=np.uint64) + np.uint64(self.seed << 32))
        values = (draws >> np.uint64(32)).astype(np.uint32)
        return values[0::2] | np.uint32(1), values[1::2]

    def apply(self, corpus: Corpus) -> dict[str, Any]:
        if (
            min(self.ngram, self.bands, self.rows) < 1
            or not 0 <= self.verify <= 1
            or not 0 <= self.seed < 1 << 32
        ):
            raise CorpusError(
                "minhash: ngram, bands and rows are at least 1, verify from 0 to 1, seed from 0 below 2^32"
            )
        parts = corpus.scan(partial(_band_keys, self, corpus.run_limit))
        runs = with_bases([runs for runs, _ in parts], corpus.bases)
        parents = corpus.parents()
        for first, later in merge(runs, corpus.memory):
            _text.join(parents, first, later)
        remove(runs)
        _text.flatten(parents)
        if self.verify:
            _verify(self, corpus, parents, [path for _, path in parts])
        return {
            "threshold": round((1 / self.bands) ** (1 / self.rows), 4),
            "chance_at_similarity": {
                s: round(self.chance(float(s)), 6) for s in ("0.5", "0.7", "0.8", "0.9")
            },
            "examples": corpus.drop_children(parents),
        }


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def band_keys(signatures: NDArray[np.uint32], bands: int) -> Keys:
    """[documents × bands, 2]: a hash of each band's number and values, documents in order.

    Two polynomials over the values, each step mixed.
    """
    values = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands).astype(np.uint64)
    keys = np.empty((len(signatures), bands, 2), np.uint64)
    for column, start in enumerate((0x243F6A8885A308D3, 0x13198A2E03707344)):
        state = np.broadcast_to(
            _mixed(np.arange(bands, dtype=np.uint64) + np.uint64(start)), values.shape[:2]
        )
        for row in range(values.shape[2]):
            state = _mixed(state ^ values[:, :, row]) + np.uint64(start)
        keys[:, :, column] = _mixed(state)
    return keys.reshape(-1, 2)


def _band_keys(rule: MinHash, limit: int, task: Task, texts: Texts) -> tuple[list[Run], str]:
    """(runs of the band keys, file of the signatures where they are wanted: one row a line, zeros where none is)."""
    path = f"{task.folder}/signatures-{task.number}.bin"
    writer = RunWriter(task.folder, f"bands-{task.number}", limit)
    a, b = rule.permutations()
    with open(path, "wb") as file:
        for indexes, batch in _batches(texts):
            signatures, words = _text.minhash(batch, rule.ngram, table(), a, b)
            full = words > 0
            signatures, indexes = signatures[full], indexes[full]
            writer.add(band_keys(signatures, rule.bands), np.repeat(indexes, rule.bands))
            if rule.verify and len(indexes):
                rows = np.zeros((indexes[-1] - indexes[0] + 1, len(a)), np.uint32)
                rows[indexes - indexes[0]] = signatures
                file.seek(indexes[0] * rows[0].nbytes)
                rows.tofile(file)
    return writer.finish(), path


def _batches(texts: Texts) -> Iterator[tuple[NDArray[np.int64], list[bytes]]]:
    indexes: list[int] = []
    batch: list[bytes] = []
    size = 0
    for index, text in texts:
        indexes.append(index)
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield np.array(indexes, np.int64), batch
            indexes, batch, size = [], [], 0
    if batch:
        yield np.array(indexes, np.int64), batch


def _verify(rule: MinHash, corpus: Corpus, parents: NDArray[np.int64], paths: list[str]) -> None:
    """Within each cluster: compare all members with the first; those too different from it start again among
    themselves, until each has a parent that stays and is similar enough, or stays itself. Takes some 50 bytes of memory
    a candidate."""
    members = np.flatnonzero(parents != np.arange(len(parents)))
    leaders = np.array(parents[members])
    while len(members):
        far = np.zeros(len(members), bool)
        for start in range(0, len(members), _PAIRS):
            part = slice(start, start + _PAIRS)
            pairs = (_signatures(rule, corpus, paths, positions[part]) for positions in (members, leaders))
            far[part] = np.mean(np.equal(*pairs), axis=1) < rule.verify
        parents[members[~far]] = leaders[~far]
        members, old = members[far], leaders[far]
        # The first of those left over in a cluster stays and leads the others.
        _, first, group = np.unique(old, return_index=True, return_inverse=True)
        leaders = members[first][group]
        parents[members[first]] = members[first]
        members, leaders = members[members != leaders], leaders[members != leaders]


def _signatures(
    rule: MinHash, corpus: Corpus, paths: list[str], positions: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """[positions, bands × rows]"""
    width = rule.bands * rule.rows
    found = np.empty((len(positions), width), np.uint32)
    pieces = np.searchsorted(corpus.bases, positions, side="right") - 1
    for number in np.unique(pieces):
        chosen = pieces == number
        rows = np.memmap(paths[number], np.uint32, "r").reshape(-1, width)
        found[chosen] = rows[positions[chosen] - corpus.bases[number]]
    return found
