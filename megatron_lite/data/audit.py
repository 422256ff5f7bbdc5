"""What a run has consumed of each source, by its checkpoint alone: documents, not only numbers of samples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_lite.config import Config, build_config
from megatron_lite.data.blend import BlendedDataset
from megatron_lite.data.build import build_run
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import GPTDataset
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.position import Position, read_position, source_key, taken_of
from megatron_lite.data.rest import start_after
from megatron_lite.data.sample_index import Tokens, locate, shuffled_documents

_STEP = re.compile(r"step_\d+$")
_CHUNK = 1 << 16


class Consumed(NamedTuple):
    """Of one source: `weight` in the present mixture (0: it left), and of each of its documents (sequences) the
    `lengths` [n] and how many tokens were `inputs` [n], over all epochs. `first`: the number of the first one."""

    prefix: str
    weight: float
    samples: int
    first: int
    lengths: NDArray[np.int32]
    inputs: NDArray[np.int64]

    @property
    def epochs(self) -> float:
        """Inputs over tokens."""
        return int(self.inputs.sum()) / max(1, int(self.lengths.sum(dtype=np.int64)))

    def documents(self) -> tuple[int, int, int]:
        """How many documents the current epoch has consumed wholly, partly, and not yet."""
        whole = math.floor(self.epochs)
        now = self.inputs - whole * self.lengths.astype(np.int64)
        holding = self.lengths > 0
        wholly = int((holding & (now >= self.lengths)).sum())
        partly = int((holding & (now > 0) & (now < self.lengths)).sum())
        return wholly, partly, int(holding.sum()) - wholly - partly


def audit(checkpoint: str | Path) -> tuple[int, list[Consumed]]:
    """(step, what of each source was consumed) of a checkpoint: its folder, or the newest one of a run's folder.

    Raises DatasetError where there is none, where it is too old to say, and where the data are other data now.
    """
    step, config, progress = read_checkpoint(checkpoint)
    if progress.get("data") is None:
        raise DatasetError(f"{checkpoint}: written before checkpoints said what each source has given")
    position, given = read_position(progress["data"])
    if position.order == "megatron":
        return step, list(_of_megatron(config, position, given, progress))
    return step, [_of_source(position, number, given[number]) for number in range(len(position.sources))]


def read_checkpoint(path: str | Path) -> tuple[int, Config, dict[str, Any]]:
    """(step, settings, progress) of a checkpoint's folder, or of the one that a run's folder resumes from."""
    folder = Path(path)
    if not (folder / "index.json").exists():
        parent = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        steps = sorted(entry for entry in parent.glob("step_*/index.json") if _STEP.match(entry.parent.name))
        if not steps:
            raise DatasetError(f"{path}: no checkpoint; give a run's output folder or a checkpoint's")
        pointer = parent / "latest"  # a run that went back to an older step has newer ones that do not count
        name = pointer.read_text(errors="replace").partition(" ")[0].strip() if pointer.is_file() else None
        folder = next((entry.parent for entry in steps if entry.parent.name == name), steps[-1].parent)
    try:
        content = json.loads((folder / "index.json").read_text())["content"]
        step, metadata = content["step"], content["metadata"]
        return step, build_config(metadata["config"], str(folder)), metadata["progress"]
    except (KeyError, json.JSONDecodeError) as error:
        raise DatasetError(f"{folder}/index.json: not a checkpoint of a run ({error})") from None


def _opened(position: Position, number: int) -> tuple[IndexedDataset, range]:
    source = position.sources[number]
    indexed, documents = IndexedDataset(source.prefix), range(*source.documents)
    if documents.stop > len(indexed) or source_key(indexed, documents) != source.key:
        raise DatasetError(f"{source.prefix}: not the data that the run has read")
    return indexed, documents


def _of_source(position: Position, number: int, given: int) -> Consumed:
    source = position.sources[number]
    indexed, documents = _opened(position, number)
    tokens = Tokens(indexed.lengths, documents, source.seed)
    history = taken_of(position, number, given)
    start = start_after(tokens, history)
    lengths = np.array(indexed.lengths[documents.start : documents.stop])
    inputs = start.epoch * lengths.astype(np.int64)
    np.subtract.at(inputs, start.rest[:, 0] - documents.start, start.rest[:, 2] - start.rest[:, 1])
    if start.skip:
        order = shuffled_documents(tokens, start.epoch)
        place, offset = locate(indexed.lengths, order, start.skip)
        inputs[order[:place] - documents.start] += lengths[order[:place] - documents.start]
        inputs[order[place] - documents.start] += offset
    samples = sum(taken.samples for taken in history)
    return Consumed(source.prefix, source.weight, samples, documents.start, lengths, inputs)


def _of_megatron(
    config: Config, position: Position, given: list[int], progress: dict[str, Any]
) -> Iterator[Consumed]:
    """Its order follows from the whole run, so the index is built as it was."""
    settings = config.model_copy(update={"train": config.train.model_copy(update={"eval_interval": None})})
    steps = progress["step"], progress["consumed_samples"]
    train = build_run(settings, *steps, progress["data"]).train
    members = train.datasets if isinstance(train, BlendedDataset) else [train]
    for number, (dataset, samples) in enumerate(zip(members, given, strict=True)):
        assert isinstance(dataset, GPTDataset)
        source, (indexed, documents) = position.sources[number], _opened(position, number)
        lengths = np.array(indexed.lengths[documents.start : documents.stop])
        stream = dataset.order["documents"]
        after = np.cumsum(indexed.lengths[stream], dtype=np.int64)
        starts = dataset.order["starts"][:samples].astype(np.int64)
        begins = after[starts[:, 0]] - indexed.lengths[stream[starts[:, 0]]] + starts[:, 1]
        # Inputs before each place of the stream, and so in each of its elements.
        begins.sort()
        ends = np.concatenate([[0], after])
        before = np.searchsorted(begins, ends, side="left")
        last = begins[np.maximum(before - 1, 0)]
        inside = np.minimum(ends - last, dataset.seq_length)
        until = np.where(before > 0, (before - 1) * dataset.seq_length + inside, 0)
        inputs = np.zeros(len(lengths), np.int64)
        np.add.at(inputs, stream - documents.start, np.diff(until))
        yield Consumed(source.prefix, source.weight, samples, documents.start, lengths, inputs)


def describe(consumed: Consumed) -> str:
    """A line for people."""
    wholly, partly, untouched = consumed.documents()
    share = f"share {consumed.weight:.4g}" if consumed.weight else "not in the mixture any more"
    return (
        f"{consumed.prefix}: {share}, {consumed.samples:,} samples, {int(consumed.inputs.sum()):,} tokens, "
        f"{consumed.epochs:.3f} epochs; of epoch {math.floor(consumed.epochs) + 1}: {wholly:,} documents wholly, "
        f"{partly:,} partly, {untouched:,} not yet"
    )


def write_list(path: str | Path, sources: Iterable[Consumed]) -> None:
    """A line for every document of which anything was consumed: prefix, sequence number, its tokens, inputs so far."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("prefix\tsequence\ttokens\tinputs\n")
        for source in sources:
            for first in range(0, len(source.lengths), _CHUNK):
                numbers = np.flatnonzero(source.inputs[first : first + _CHUNK]) + first
                rows = np.stack([numbers + source.first, source.lengths[numbers], source.inputs[numbers]], 1)
                file.writelines(
                    f"{source.prefix}\t{i}\t{tokens}\t{inputs}\n" for i, tokens, inputs in rows.tolist()
                )
