"""Exports killed at every call that changes the disk: there is no half of a model, and exporting again works."""

import builtins
import io
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint import CheckpointError
from megatron_lite.checkpoint.huggingface import exporting, import_huggingface
from megatron_lite.checkpoint.huggingface.exporting import export_huggingface
from megatron_lite.checkpoint.merge import merge
from tests.checkpoint.test_reshard import save_model

CALLS = ("mkdir", "open", "pwrite", "ftruncate", "fsync", "replace", "unlink")
INDEX = "model.safetensors.index.json"
# The function, its argument that says how large a file may be, and what readers know its model by.
KINDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "export": (export_huggingface, "shard_bytes", "config.json"),
    "merge": (merge, "file_bytes", "model_config.json"),
}
ONE_FILE, SEVERAL = 5_000_000_000, 16000


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead process wrote stays without fsync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def killed(write: Callable[[], Any], at: int) -> bool:
    """Whether a process that writes was killed, just before its call number `at`; else it came to its end."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            count = iter(range(at))
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name), count))
            builtins.open = io.open = opened_and_counted(count)
            write()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


def counted(call: Callable[..., Any], count: Any) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            os._exit(9)
        return call(*args, **kwargs)

    return wrapped


def opened_and_counted(count: Any) -> Callable[..., Any]:
    """`open`, killed when a file was opened to be written and nothing is in it yet."""
    plain = io.open

    def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        found = plain(file, mode, *args, **kwargs)
        if "w" in mode and next(count, None) is None:
            os._exit(9)
        return found

    return wrapped


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def assert_no_half(found: dict[str, bytes], whole: dict[str, bytes], description: str) -> None:
    weights = {name for name in whole if name.endswith(".safetensors")}
    held = {name for name in found if name.endswith(".safetensors")}
    assert all(found[name] == whole[name] for name in held), "a file under its own name is not whole"
    if held:
        described = found.keys() & {INDEX, description}
        assert held == weights or not described, "there is a model, and weights of it are not"
        assert all(found[name] == whole.get(name) for name in described), "it is described as another model"


@pytest.mark.parametrize("before", ["nothing", "another description"])
@pytest.mark.parametrize("size", [ONE_FILE, SEVERAL])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere(tmp_path: Path, kind: str, size: int, before: str) -> None:
    source = save_model(tmp_path / "run", "llama")
    call, argument, description = KINDS[kind]
    whole = {}
    for each in (ONE_FILE, SEVERAL):
        call(source, tmp_path / str(each), **{argument: each})
        whole[each] = contents(tmp_path / str(each))
    at = 0
    while True:
        target = tmp_path / f"killed at {at}"
        if before == "another description":  # of a model whose weights were deleted
            target.mkdir()
            (target / description).write_text("{}")
            (target / INDEX).write_text("{}")
        if not killed(partial(call, source, target, **{argument: size}), at):
            break
        assert_no_half(contents(target), whole[size], description)
        again = (ONE_FILE, SEVERAL)[at % 2]
        call(source, target, **{argument: again})
        assert contents(target) == whole[again]
        at += 1
    assert contents(target) == whole[size] and at > 12


def gpt2_files(folder: Path) -> str:
    """The specification of a tokenizer of few ids, in GPT-2's pair of files."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return f"gpt2:{folder}"


def test_killed_anywhere_no_half_of_a_tokenizer_is_left(tmp_path: Path) -> None:
    spec = gpt2_files(tmp_path / "gpt2")
    export = partial(export_huggingface, save_model(tmp_path / "run", "llama"), tokenizer=spec)
    export(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"} < whole.keys()
    for at in itertools.count():
        target = tmp_path / f"killed at {at}"
        if not killed(partial(export, target), at):
            break
        found = contents(target)
        own = [name for name in found if not name.endswith(".tmp") and name in whole]
        assert all(found[name] == whole[name] for name in own), "a file under its own name is not whole"
        assert not own or "model.safetensors" in own, "a tokenizer is there without a model"
        export(target)
        assert contents(target) == whole
    assert contents(target) == whole and at > 24


def test_no_weights_of_others_are_replaced(tmp_path: Path) -> None:
    source, target = save_model(tmp_path / "run"), tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").touch()
    (target / "unfinished_export.json").write_text(
        json.dumps({"weights": ["model-00001-of-00002.safetensors"]})
    )
    with pytest.raises(CheckpointError, match="holds safetensors files already"):
        merge(source, target)
    (target / "unfinished_export.json").write_text(json.dumps({"weights": ["model.safetensors"]}))
    assert merge(source, target) == ["model.safetensors"]
    assert not (target / "unfinished_export.json").exists()
    with pytest.raises(CheckpointError, match="holds safetensors files already"):
        merge(source, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source, write, calls = save_model(tmp_path / "run"), exporting.write_safetensors, []
    call, argument, _ = KINDS[kind]
    if kind == "export":
        call = partial(call, tokenizer=gpt2_files(tmp_path / "gpt2"))

    def full(path: Path, *args: Any) -> Any:
        calls.append(path)
        if len(calls) == 3:
            path.touch()
            raise OSError(28, "No space left on device")
        return write(path, *args)

    monkeypatch.setattr(exporting, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        call(source, tmp_path / "target", **{argument: 16000})
    assert len(calls) == 3 and contents(tmp_path / "target") == {}


def test_an_export_that_was_cut_short_says_so(tmp_path: Path) -> None:
    source, target = save_model(tmp_path / "run"), tmp_path / "target"
    export_huggingface(source, target, shard_bytes=16000)
    (target / INDEX).unlink()
    (target / "unfinished_export.json").write_text('{"weights": []}')
    with pytest.raises(CheckpointError, match="an export into it was cut short; export again"):
        import_huggingface(target, tmp_path / "back")


def test_killed_again_and_again(tmp_path: Path) -> None:
    """What one run left, the next one clears away, also where it is killed meanwhile, and has other files."""
    source, target = save_model(tmp_path / "run"), tmp_path / "target"
    merge(source, tmp_path / "whole")
    sizes = [size for _ in range(99) for size in (ONE_FILE, SEVERAL)]
    for at, size in enumerate(sizes):
        if not killed(partial(merge, source, target, file_bytes=size), at // 2):
            break
    assert size == ONE_FILE, "which takes fewer calls"
    assert contents(target) == contents(tmp_path / "whole")
