"""Any layout reads what any other wrote, bit for bit."""

import itertools
import json
import os
import random
import shutil
import zlib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import (
    KINDS,
    CheckpointError,
    DamagedCheckpoint,
    Piece,
    Reader,
    find_latest,
    resolve,
    save,
)
from megatron_lite.checkpoint.index import read_index, write_index
from megatron_lite.checkpoint.store import save_files
from tests.checkpoint.ranks import SHAPES, cut, layout, random_state, save_state

LAYOUTS = [(1, 1, 1, 0), (2, 2, 2, 1), (4, 1, 3, 2), (1, 3, 5, 3), (2, 1, 4, 3), (4, 2, 1, 1), (1, 1, 7, 1)]


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_layout_reads_what_every_other_wrote(tmp_path, source):
    state = random_state(1)
    path = save_state(tmp_path, 7, state, *source)
    with Reader(path) as reader:
        reader.verify()
        assert reader.step == 7 and reader.metadata == {"consumed_samples": 70}
        assert reader.kinds == list(KINDS) and reader.names() == sorted(SHAPES)
        for target in LAYOUTS:
            for owned in layout(*target):
                for (name, (dim, start, stop, low, high)), kind in itertools.product(owned, KINDS):
                    got = reader.read_flat(name, kind, dim, start, stop, low, high)
                    assert torch.equal(got, cut(state[kind][name], dim, start, stop, low, high)), (
                        target,
                        name,
                    )


def test_random_layouts_and_slices(tmp_path):
    rng = random.Random(5)
    for trial in range(12):
        state = random_state(trial)
        path = save_state(
            tmp_path, trial, state, rng.choice([1, 2, 4]), rng.randint(1, 4), rng.randint(1, 9), trial % 4
        )
        with Reader(path) as reader:
            for name, (shape, dim) in SHAPES.items():
                whole = state["exp_avg"][name]
                assert torch.equal(reader.read(name, "exp_avg"), whole) and reader.shape(name) == shape
                if dim is None:
                    continue
                start = rng.randrange(shape[dim])
                stop = rng.randint(start + 1, shape[dim])
                shard = whole.narrow(dim, start, stop - start)
                assert torch.equal(reader.read(name, "exp_avg", dim=dim, start=start, stop=stop), shard)
                low = rng.randrange(shard.numel())
                high = rng.randint(low, shard.numel())
                flat = reader.read_flat(name, "exp_avg", dim, start, stop, low, high)
                assert torch.equal(flat, shard.reshape(-1)[low:high])


def test_only_files_that_hold_something_wanted_are_read(tmp_path):
    path = save_state(tmp_path, 1, random_state(0), 2, 1, 4, 3)
    with Reader(path) as reader:
        for file in path.glob("rank_*"):
            if file.name != "rank_00000.safetensors":
                file.unlink()
        reader.read_flat("blocks.0.mlp.linear_fc2.weight", "weight", 1, 0, 6, 0, 8)
        with pytest.raises(DamagedCheckpoint, match=r"rank_0000\d.safetensors cannot be read"):
            reader.read_flat("blocks.0.mlp.linear_fc2.weight", "weight", 1, 0, 6, 0, 9)


@pytest.mark.parametrize(
    "elsewhere", ["../step_1/a.safetensors", "/etc/hostname", "folder/a", "./a", "..", ""]
)
def test_files_of_other_folders_are_not_opened(tmp_path, elsewhere):
    """index.json is anyone's: sum and all, whoever hands out a checkpoint writes it."""
    path = save_state(tmp_path, 1, random_state(0), 1, 1, 1, 0)
    index = read_index(path)
    (entry,) = index.files
    write_index(path, index._replace(files=[replace(entry, file=elsewhere)]))
    with pytest.raises(CheckpointError, match=f'index.json names "{elsewhere}", which is not in its folder'):
        Reader(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(tmp_path, dtype):
    data = torch.randn(5, 3).to(dtype)
    pieces = [Piece.whole("a", "weight", data), Piece.whole("b", "weight", torch.ones(3))]
    with Reader(save(tmp_path, 0, pieces, {})) as reader:
        assert reader.dtype("a") == dtype and torch.equal(reader.read("a"), data)
        assert torch.equal(reader.read("b"), torch.ones(3))


def test_the_files_are_plain_safetensors(tmp_path):
    state = random_state(0)
    path = save_state(tmp_path, 1, state)
    tensors = safetensors.torch.load_file(path / "rank_00000.safetensors")
    assert len(tensors) == len(SHAPES) * 3
    assert torch.equal(
        tensors["exp_avg/position.weight/0:7/0"], state["exp_avg"]["position.weight"].reshape(-1)
    )


def test_a_vocabulary_padded_otherwise_is_read_where_they_overlap(tmp_path):
    state = random_state(0)
    whole = state["weight"]["embed.weight"]
    with Reader(save_state(tmp_path, 1, state, 4, 1, 2, 1)) as reader:
        wider = reader.read("embed.weight", dim=0, start=0, stop=30, zero_fill=True)
        assert torch.equal(wider[:24], whole) and wider.shape == (30, 5) and not wider[24:].any()
        for dtype in (torch.float32, torch.bfloat16):
            target = torch.full((28 * 5,), 7.0, dtype=dtype)
            reader.read_into(target, "embed.weight", "weight", 0, 2, 30, 0, zero_fill=True)
            assert torch.equal(target.view(28, 5), wider[2:].to(dtype))
        shard = reader.read_flat("embed.weight", "weight", 0, 20, 30, 15, 25, zero_fill=True)
        assert torch.equal(shard, torch.cat([whole[23], torch.zeros(5)]))
        assert not reader.read("embed.weight", dim=0, start=24, stop=30, zero_fill=True).any()
        assert torch.equal(reader.read("embed.weight", dim=0, start=0, stop=20), whole[:20])
        with pytest.raises(CheckpointError, match=r"embed.weight .*has 24 along dimension 0, not 20:30"):
            reader.read("embed.weight", dim=0, start=20, stop=30)


def test_what_is_not_there_is_named(tmp_path):
    with Reader(save(tmp_path, 3, [Piece.whole("norm.weight", "weight", torch.ones(3))], {})) as reader:
        with pytest.raises(CheckpointError, match=r"step_00000003.*parameter nom.weight .*is not there"):
            reader.read("nom.weight")
        with pytest.raises(CheckpointError, match=r"norm.weight \(exp_avg\) is there as weight only"):
            reader.read("norm.weight", "exp_avg")
        with pytest.raises(CheckpointError, match="no dimension 1"):
            reader.read("norm.weight", dim=1, start=0, stop=1)
        with pytest.raises(CheckpointError, match="holds 1 of the 2 elements"):
            reader.read_flat("norm.weight", "weight", None, 0, None, 2, 4)
    with (
        Reader(save_state(tmp_path, 4, random_state(0), 2, 1, 1, 1)) as reader,
        pytest.raises(CheckpointError, match="is sharded along dimension 1, not 0"),
    ):
        reader.read("blocks.0.mlp.linear_fc2.weight", dim=0, start=0, stop=2)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_flipped_bit_is_found_and_named(tmp_path):
    state = random_state(0)
    path = save_state(tmp_path, 1, state, 2, 1, 1, 1)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        for at in [0, 8, *(rng.randrange(file.stat().st_size) for _ in range(25))]:
            flip(file, at)
            with pytest.raises(CheckpointError, match=file.name), Reader(path) as reader:
                reader.verify()
            flip(file, at)
    with Reader(path) as reader:
        reader.verify()
    flip(path / "rank_00001.safetensors", -1)
    with Reader(path) as reader:
        reader.verify("weight")
        with pytest.raises(
            DamagedCheckpoint, match=r"rank_00001.safetensors is damaged: exp_avg_sq/blocks\.0\.mlp"
        ):
            reader.verify("exp_avg_sq")


def test_missing_and_truncated_files_are_named_on_opening(tmp_path):
    path = save_state(tmp_path, 1, random_state(0), 4, 1, 1, 1)
    os.truncate(path / "rank_00002.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"rank_00002.safetensors has 100 bytes instead of the \d+"):
        Reader(path)
    (path / "rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001.safetensors is missing; .*rank_00002.*restore"):
        Reader(path)
    (path / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index.json is not there, so the folder is no complete"):
        Reader(path)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    path = save_state(tmp_path, 1, random_state(0))
    with Reader(path) as reader:
        os.truncate(path / "rank_00000.safetensors", 2000)
        with pytest.raises(CheckpointError, match=r"rank_00000.safetensors cannot be read \(it ends at byte"):
            reader.read("blocks.0.mlp.linear_fc2.weight", "exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [False, True])
def test_reading_into_a_tensor_of_any_type_and_stride(tmp_path, dtype, check, monkeypatch):
    monkeypatch.setattr("megatron_lite.checkpoint.reader._CHUNK", 16)  # so that threads share a piece
    state = random_state(0)
    with Reader(save_state(tmp_path, 1, state, 2, 1, 3, 1), check=check) as reader:
        for name, (dim, start, stop, low, high) in [one for rank in layout(4, 1, 2, 3) for one in rank]:
            expected = cut(state["exp_avg"][name], dim, start, stop, low, high).to(dtype)
            for step in (1, 2):
                around = torch.full((len(expected) + 2, step), 7.0, dtype=dtype)
                reader.read_into(around[1:-1, 0], name, "exp_avg", dim, start, stop, low)
                assert torch.equal(around[1:-1, 0], expected)
                assert (around[[0, -1]] == 7).all() and (around[:, 1:] == 7).all(), "nothing beside it"
        if check:
            reader.verify()


def test_an_index_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lite.checkpoint.index.VERSION", 3)
    path = save_state(tmp_path, 1, random_state(0))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is megatron_lite version 3, and this release reads"):
        Reader(path)


def test_an_index_of_version_1_is_read_and_checked(tmp_path):
    """It had the checksum of the content with its keys sorted."""
    path = (
        save(tmp_path, 1, [Piece.whole("a", "weight", torch.arange(5.0))], {"lr": 1e-5, "b": 1})
        / "index.json"
    )
    content = json.loads(path.read_text())["content"] | {"version": 1}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    whole = {"checksum": f"crc32:{zlib.crc32(text.encode()):08x}", "content": content}
    path.write_text(json.dumps(whole, separators=(",", ":")))
    with Reader(path.parent) as reader:
        reader.verify()
        assert reader.read("a").tolist() == [0, 1, 2, 3, 4] and reader.metadata == {"lr": 1e-5, "b": 1}
    for old, new in (("1e-05", "1E-05"), ('"b":1', '"b":2')):
        changed = path.read_text().replace(old, new)
        assert changed != path.read_text()
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "index.json").write_text(changed)
        with pytest.raises(CheckpointError, match="does not match its own checksum"):
            Reader(tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.clear(),
        lambda content: content.pop("files"),
        lambda content: content.update(files=[]),
        lambda content: content["files"]["rank_00000.safetensors"].pop("pieces"),
        lambda content: content["parameters"].clear(),
        lambda content: content["files"]["rank_00000.safetensors"]["pieces"][0].pop(),
    ],
)
def test_an_index_that_is_none_is_passed_over(tmp_path, caplog, change):
    """Whoever wrote it, with a checksum that is right."""
    for step in (1, 2):
        save(tmp_path, step, [Piece.whole("a", "weight", torch.ones(5))], {})
    path = tmp_path / "step_00000002" / "index.json"
    content = json.loads(path.read_text())["content"]
    change(content)
    text = json.dumps(content)
    path.write_text(f'{{"checksum":"crc32:{zlib.crc32(text.encode()):08x}","content":{text}}}')
    assert find_latest(tmp_path) == tmp_path / "step_00000001"
    assert "step_00000002 cannot be used" in caplog.text


def test_a_gap_behind_an_overlap_is_found(tmp_path):
    """As many elements as there should be, some of them twice; no save of ours writes it."""
    halves = [Piece("a", "weight", (6,), None, 0, 0, at, torch.ones(3)) for at in (0, 3)]
    path = save_files(tmp_path, 1, [[half] for half in halves], {})
    index = read_index(path)
    index.files[1] = replace(index.files[0], file="rank_00001.safetensors")
    write_index(path, index)
    shutil.copy(path / "rank_00000.safetensors", path / "rank_00001.safetensors")
    with Reader(path) as reader, pytest.raises(CheckpointError, match=r"a .weight.: .* 0:3 is there twice"):
        reader.verify()


def test_latest_falls_back_and_says_why(tmp_path, caplog):
    assert find_latest(tmp_path) is None and find_latest(tmp_path / "none") is None
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save_state(folder, step, random_state(step))
    assert find_latest(tmp_path) == find_latest(folder) == folder / "step_00000030"
    flip(folder / "step_00000030" / "rank_00000.safetensors", -1)
    assert find_latest(tmp_path) == folder / "step_00000030"
    assert not caplog.records
    assert find_latest(tmp_path, checksums=True) == folder / "step_00000020"
    assert "step_00000030 cannot be used" in caplog.text and "exp_avg_sq/scale" in caplog.text
    (folder / "step_00000020" / "index.json").unlink()
    assert find_latest(tmp_path, checksums=True) == folder / "step_00000010"
    (folder / "step_00000010" / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*step_00000010.*start afresh"):
        find_latest(tmp_path, checksums=True)


def test_latest_is_the_one_saved_last_not_the_one_of_the_highest_step(tmp_path):
    save_state(tmp_path, 50, random_state(0))
    save_state(tmp_path, 100, random_state(0))
    save_state(tmp_path, 60, random_state(0))  # a run that was rewound to 50
    assert find_latest(tmp_path) == tmp_path / "step_00000060"
    (tmp_path / "step_00000060" / "index.json").unlink()
    assert find_latest(tmp_path) == tmp_path / "step_00000050"
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == tmp_path / "step_00000100"


def test_resolve_takes_a_step_a_checkpoints_folder_or_an_output_directory(tmp_path):
    step = save_state(tmp_path / "checkpoints", 5, random_state(0))
    assert resolve(step) == resolve(tmp_path / "checkpoints") == resolve(str(tmp_path)) == step
    flip(step / "rank_00000.safetensors", -1)
    assert resolve(step) == step
    for path in (step, tmp_path):
        with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged"):
            resolve(path, checksums=True)
    elsewhere = step.rename(tmp_path / "my_best")
    assert resolve(elsewhere) == elsewhere
    with pytest.raises(CheckpointError, match="no checkpoint there; give a step folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"index.json is not there"):
        resolve(tmp_path / "step_00000009")


def test_weights_alone_are_not_taken_unasked_but_pointed_to(tmp_path):
    save_state(tmp_path / "weights", 5, random_state(0))
    assert find_latest(tmp_path) is None
    with pytest.raises(
        CheckpointError, match=r"no checkpoint there \(weights alone are in .*/weights\); give"
    ):
        resolve(tmp_path)
    assert resolve(tmp_path / "weights") == tmp_path / "weights" / "step_00000005"


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            "config.json",
            r"it is a Hugging Face model: import it with tools/convert_checkpoint.py --load \S+ --save",
        ),
        (
            "model_config.json",
            r"it holds weights for other programs, as tools/convert_checkpoint.py --to safetensors .* not read back",
        ),
        ("readme.md", "give a step folder or a run's output directory"),
    ],
)
def test_a_folder_of_safetensors_is_told_from_an_empty_one(tmp_path, file, told):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint there; give a step folder"):
        resolve(folder)
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"other: no checkpoint there; {told}"):
        resolve(folder)


@pytest.mark.parametrize(
    "file",
    [
        "latest_checkpointed_iteration.txt",
        ".metadata",
        "mp_rank_00_model_states.pt",
        "mp_rank_00/x.pt",
        "latest_universal",
    ],
)
def test_a_folder_of_another_system_is_told_from_an_empty_one(tmp_path, file):
    (tmp_path / "1" / file).parent.mkdir(parents=True)
    (tmp_path / "1" / file).touch()
    with pytest.raises(
        CheckpointError, match=r"Megatron-LM or DeepSpeed checkpoint: import it with \S+ --load"
    ):
        resolve(tmp_path / "1")
