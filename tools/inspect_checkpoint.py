"""Say what a checkpoint holds, check that it is whole, or compare it with another.

    python tools/inspect_checkpoint.py runs/gpt [--verify] [--norms] [--json]
    python tools/inspect_checkpoint.py runs/gpt --diff runs/other/checkpoints/step_00001000

Shows the training position, the layout that wrote it, the files with their sizes, and the parameters as a tree, blocks
that are alike once. PATH and OTHER may also be a Hugging Face folder (compared with ours by our names, its vocabulary
without padding) or plain safetensors. A diff gives for each parameter, and for its moments where both have them, the
largest difference of two elements, and how much that is of the largest element. Little of a checkpoint is in memory at
a time, whatever its size.
Exit status: 0 done (and with --diff: no element differs), 1 with --diff: something differs, 2 no checkpoint there or a
damaged one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint import KINDS, CheckpointError
from megatron_lite.checkpoint.diff import (
    Difference,
    Own,
    Tensors,
    differences,
    norm,
    one_sided,
    open_one,
    open_two,
)
from megatron_lite.checkpoint.latest import step_folders
from megatron_lite.command import command

_BLOCK = re.compile(r"(.*?\b\d+)\.(.+)")
# Metadata with lines of their own, or pages long (index.json has them).
_SHOWN_APART = ("progress", "layout", "config", "huggingface")


@command()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, help="a step folder, a checkpoints folder or a run's output directory"
    )
    parser.add_argument("--verify", action="store_true", help="read every byte and check it")
    parser.add_argument("--norms", action="store_true", help="L2 norm of each parameter and of its moments")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with this one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    if options.diff is not None:
        return diff(options)
    tensors = open_one(options.path)
    if options.verify:
        verify(tensors, options.path)
    found = describe(tensors, options.path, options.norms)
    if options.json:
        print(json.dumps(found | ({"verified": True} if options.verify else {}), indent=2))
    else:
        print("\n".join(text_of(found, options.verify)))
    return 0


def verify(tensors: Tensors, path: Path) -> None:
    """Raises CheckpointError where it is damaged, or where that is so of the step that a run's folder is to mean."""
    if not isinstance(tensors, Own):
        raise CheckpointError(f"{path} holds no checksums; only checkpoints of ours do")
    tensors.reader.verify()
    step = tensors.reader.path
    if path.resolve() != step.resolve() and (first := step_folders(step.parent)[0]) != step:
        raise CheckpointError(f"{first} is damaged, as said above; {step}, the next to resume from, is whole")


def describe(tensors: Tensors, path: Path, norms: bool) -> dict[str, Any]:
    """All there is to say, as JSON."""
    kinds = [kind for kind in KINDS if tensors.names(kind)]
    parameters = []
    for name in tensors.names("weight"):
        entry: dict[str, Any] = {"name": name, "shape": list(tensors.shape(name))}
        entry["dtypes"] = {kind: str(tensors.dtype(name, kind)).removeprefix("torch.") for kind in kinds}
        if norms:
            entry["norms"] = {kind: finite(norm(tensors, name, kind)) for kind in kinds}
        parameters.append(entry)
    found = {"path": str(path), "kinds": kinds, "parameters": parameters}
    if isinstance(tensors, Own):
        reader = tensors.reader
        sizes = {file: (reader.path / file).stat().st_size for file in reader.files}
        found |= {"path": str(reader.path), "step": reader.step, "metadata": reader.metadata, "files": sizes}
    return found


def finite(value: float) -> float | str:
    """What strict JSON can hold."""
    return value if math.isfinite(value) else str(value)


def text_of(found: dict[str, Any], verified: bool) -> Iterator[str]:
    kinds = ", ".join(found["kinds"])
    if "files" not in found:
        yield f"{found['path']}: holds {kinds}"
    else:
        files = found["files"]
        if verified:
            yield f"verified: every checksum of {counted(len(files), 'file')} is right"
        size = sum(files.values())
        yield f"{found['path']}: step {found['step']}, {counted(len(files), 'file')}, {size:,} bytes, holds {kinds}"
        yield from position_of(found["metadata"])
        yield from (f"{file}  {size:,} bytes" for file, size in files.items())
    yield from tree_of(found["parameters"])
    total = sum(math.prod(entry["shape"]) for entry in found["parameters"])
    yield f"parameters {total:,} in {len(found['parameters'])} tensors"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def position_of(metadata: dict[str, Any]) -> Iterator[str]:
    """Where training was, and what wrote it."""
    if progress := metadata.get("progress"):
        samples, tokens = progress.get("consumed_samples", 0), progress.get("consumed_tokens", 0)
        yield f"position: step {progress.get('step')}, {samples:,} samples, {tokens:,} tokens"
        data = progress.get("data") or {}
        for source in data.get("sources", []):
            before = sum(taken[-1] for taken in source["history"])
            line = f"  {source['prefix']}: weight {source['weight']:g}, {counted(source['given'], 'sample')} given"
            yield line + (f", {before:,} before sample {data['first']:,}" if before else "")
    if layout := metadata.get("layout"):
        yield "written by: " + ", ".join(f"{key} {value}" for key, value in layout.items())
    for key, value in metadata.items():
        if key not in _SHOWN_APART:
            yield f"{key} {json.dumps(value)}"


def tree_of(parameters: list[dict[str, Any]]) -> Iterator[str]:
    """One line a parameter, and those of a block under its name; blocks in a row that are alike once."""
    width = max((len(entry["name"]) for entry in parameters), default=0)
    groups: list[tuple[str, list[tuple[str, str]]]] = []  # prefix, or "" for a parameter of no block
    for prefix, entries in itertools.groupby(parameters, key=lambda entry: split(entry["name"])[0]):
        rows = [(split(entry["name"])[1], values_of(entry)) for entry in entries]
        groups.append((prefix, rows))
    # Names between numbers, numbers between names: each is compared with its like.
    groups.sort(
        key=lambda group: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", group[0])]
    )
    for _, alike in itertools.groupby(groups, key=lambda group: (kind_of(group[0]), group[1])):
        same = list(alike)
        prefix, rows = same[0]
        if prefix:
            more = f" … {same[-1][0]} ({len(same)} alike)" if len(same) > 1 else ""
            yield f"{prefix}{more}"
        indent = "  " if prefix else ""
        for name, values in rows:
            yield f"{indent + name:{width}}  {values}".rstrip()


def split(name: str) -> tuple[str, str]:
    """A name's block ("blocks.3") and the rest."""
    match = _BLOCK.fullmatch(name)
    return (match[1], match[2]) if match else ("", name)


def kind_of(prefix: str) -> str:
    """What the blocks of a row have in common: their names without the last number."""
    return re.sub(r"\d+$", "", prefix)


def values_of(entry: dict[str, Any]) -> str:
    dtypes = entry["dtypes"]
    shown = dtypes["weight"] if len(set(dtypes.values())) == 1 else "/".join(dtypes.values())
    line = f"{shown:8}  {entry['shape']!s:20}"
    for kind, value in entry.get("norms", {}).items():
        line += f"  |{kind}| " + (value if isinstance(value, str) else f"{value:.6g}")
    return line


def diff(options: argparse.Namespace) -> int:
    first, second = open_two(options.path, options.diff)
    if options.verify:
        verify(first, options.path)
        verify(second, options.diff)
    only = one_sided(first, second)
    found = []
    same = not any(only)
    if not options.json:
        for path, names in zip((options.path, options.diff), only, strict=True):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                print(f"only in {path}: {', '.join(names[:8])}{more}")
    for difference in differences(first, second):
        found.append(difference)
        same = same and not difference.differs
        if not options.json and difference.differs:
            print(line_of(difference), flush=True)
    if options.json:
        rows = [
            dataclasses.asdict(each) | {"absolute": finite(each.absolute), "relative": finite(each.relative)}
            for each in found
        ]
        print(json.dumps({"same": same, "only": only, "differences": rows}, indent=2))
    elif differing := [each for each in found if each.differs]:
        most = max(differing, key=lambda each: each.relative)
        print(f"{len(differing)} of {counted(len(found), 'tensor')} differ, most of all {label(most)}")
    else:
        print(f"every element of {counted(len(found), 'tensor')} is the same")
    for each, path in ((first, options.path), (second, options.diff)):
        if isinstance(each, Own) and not options.json:
            print(f"{path} is at step {each.reader.step}")
    return 0 if same else 1


def label(difference: Difference) -> str:
    return difference.name if difference.kind == "weight" else f"{difference.name} ({difference.kind})"


def line_of(difference: Difference) -> str:
    if difference.numel == 0:
        return f"{label(difference)}: {difference.note}"
    note = f", {difference.note}" if difference.note else ""
    sizes = f"largest difference {difference.absolute:.3g}, {difference.relative:.1e} of the largest element"
    return f"{label(difference)}: {sizes}, in {difference.count:,} of {difference.numel:,} elements{note}"


if __name__ == "__main__":
    sys.exit(main())
