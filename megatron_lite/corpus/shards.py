"""A run divided over many machines: which part of the input is whose, and putting the results together.

Every machine runs the same command but for its number. Each takes a part of the input that follows the one before, so
that the results, one after the other, are byte for byte what one machine would have written.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.corpus.files import CorpusError, format_of, split_ending
from megatron_lite.corpus.reader import Chunk, read_chunks
from megatron_lite.data.merge import Merged, merge_datasets

FORMAT = "megatron_lite shard"


class Shard(NamedTuple):
    """Number `number` (from 0) of `total`."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "I/N". Raises ValueError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        shard = cls(*map(int, found.groups())) if found else cls(0, 0)
        if shard.number >= shard.total:
            raise ValueError(f"{text}: not I/N with I from 0 to N - 1")
        return shard

    def of(self, prefix: str) -> str:
        """The prefix of this shard's files; of one shard alone, `prefix` itself."""
        return prefix if self.total == 1 else f"{prefix}-{self.number:05d}-of-{self.total:05d}"


WHOLE = Shard(0, 1)


class Part(NamedTuple):
    """A chunk, and where it lies: number of the file, of the chunk in it, and bytes of all files up to its end (of a
    file that is compressed, up to its beginning)."""

    file: int
    number: int
    position: int
    chunk: Chunk


def read_parts(
    files: Sequence[str], sizes: Sequence[int], shard: Shard, chunk_bytes: int, done: tuple[int, int] = (0, 0)
) -> Iterator[Part]:
    """The chunks of one shard in order, from `done` (file, chunks of it) on.

    The bytes of all files are divided evenly. A chunk is its shard's whose bytes hold the chunk's first; a file that is
    compressed or not JSON lines goes whole to one shard.
    """
    total = sum(sizes)
    low = total * shard.number // shard.total
    high = total * (shard.number + 1) // shard.total if shard.number + 1 < shard.total else total + 1
    begin = 0
    for file, (path, size) in enumerate(zip(files, sizes, strict=True)):
        divisible = format_of(path) == "jsonl" and not split_ending(path)[1]
        ours = begin < high and begin + size > low if divisible else low <= begin < high
        if ours and file >= done[0]:
            yield from _parts_of(path, file, begin, (low, high) if divisible else None, chunk_bytes, done)
        begin += size


def _parts_of(
    path: str, file: int, begin: int, own: tuple[int, int] | None, chunk_bytes: int, done: tuple[int, int]
) -> Iterator[Part]:
    at = begin
    for number, chunk in enumerate(read_chunks([path], chunk_bytes)):
        first = at
        if own is not None:
            at += chunk.size
            if first >= own[1]:
                return
        if (own is None or first >= own[0]) and (file, number) >= done:
            yield Part(file, number, at, chunk)


def write_manifest(prefix: str, shard: Shard, content: dict[str, Any]) -> None:
    """PREFIX-NUMBER-of-TOTAL.manifest.json: what the shard was made of and what it holds."""
    path = Path(shard.of(prefix) + ".manifest.json")
    temporary = Path(f"{path}.partial")
    whole = {"format": FORMAT, "version": 1, "shard": shard.number, "shards": shard.total, **content}
    temporary.write_text(json.dumps(whole, indent=2) + "\n")
    os.replace(temporary, path)


def join_shards(prefix: str | os.PathLike[str]) -> list[Merged]:
    """Put the shards of `prefix` together: the files that one run without shards writes, sidecars included.

    Raises CorpusError where a shard is missing, or was made of other inputs or with other settings.
    """
    prefix = os.fspath(prefix)
    manifests = _manifests(prefix)
    first = manifests[0]
    for manifest in manifests[1:]:
        for key in ("shards", "inputs", "settings"):
            if manifest[key] != first[key]:
                raise CorpusError(
                    f"{manifest['path']}: {key} are not those of {first['path']}: run the shard again with the same "
                    "command"
                )
    missing = sorted(set(range(first["shards"])) - {manifest["shard"] for manifest in manifests})
    if missing:
        raise CorpusError(
            f"{prefix}: of {first['shards']} shards {len(missing)} are missing or not finished: "
            f"{', '.join(map(str, missing[:20]))}{' …' if len(missing) > 20 else ''}"
        )
    parts = [Shard(manifest["shard"], manifest["shards"]).of(prefix) for manifest in manifests]
    return [
        merged
        for name in first["datasets"]
        for merged in merge_datasets([f"{part}_{name}" for part in parts], f"{prefix}_{name}")
    ]


def _manifests(prefix: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(glob.glob(f"{glob.escape(prefix)}-*-of-*.manifest.json")):
        try:
            content = json.loads(Path(path).read_bytes())
        except ValueError as error:
            raise CorpusError(f"{path}: damaged: {error}; run the shard again") from None
        if isinstance(content, dict) and content.get("format") == FORMAT:
            found.append({**content, "path": path})
    if not found:
        raise CorpusError(f"{prefix}: no {prefix}-…-of-….manifest.json: run the shards first")
    return sorted(found, key=lambda manifest: manifest["shard"])
