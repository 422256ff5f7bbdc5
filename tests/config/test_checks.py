"""Checks against the ranks, the device, the tokenizer and the files of the run."""

from pathlib import Path

import pytest

from megatron_lite.config import Config, ConfigError, load_config


def message(call: object, *args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)  # type: ignore[operator]
    return str(caught.value)


def test_ranks_fit_the_layout(small: Path) -> None:
    config = load_config(small, ["parallel.tensor=4", "parallel.pipeline=2"])
    assert (config.data_parallel_size(16), config.accumulation_steps(16)) == (2, 4)
    said = "parallel: this layout (tensor = 4 x pipeline = 2) needs a multiple of 8 ranks; there are 6"
    assert said in message(config.check_world, 6)
    assert said in message(config.data_parallel_size, 6)
    assert "needs a multiple of 8 ranks; there is 1" in message(config.deepspeed_dict, 1)
    assert "there are 0" in message(config.check_world, 0)


def test_ranks_fit_the_batch(small: Path) -> None:
    config = load_config(small)
    said = "16 is no multiple of micro_batch_size x data-parallel size = 2 x 3; nearest: 18"
    assert said in message(config.check_world, 3)
    assert said in message(config.accumulation_steps, 3)
    assert "2 x 16; nearest: 32" in message(config.check_world, 16)
    load_config(small, ["train.global_batch_size=18"]).check_world(3)


def test_load_config_reports_ranks_and_files_with_the_rest(small: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(small, ["optimizer.min_lr=1"], world_size=3, check_files=True)
    keys = [line.strip().partition(":")[0] for line in str(caught.value).splitlines()]
    assert keys[1:] == ["optimizer.min_lr", "train.global_batch_size", "data.train"]


def test_vocabulary_from_the_tokenizer(small: Path) -> None:
    config = load_config(small)
    assert config.with_vocab_size(257).model.padded_vocab_size == 384
    assert load_config(small, ["model.vocab_size=300"]).with_vocab_size(257).model.vocab_size == 300
    assert load_config(small, ["model.vocab_size=257"]).with_vocab_size(257).model.vocab_size == 257
    fewer = load_config(small, ["model.vocab_size=256"])
    said = message(fewer.with_vocab_size, 257)
    assert "model.vocab_size: 256 is less than the tokenizer's 257 ids; nearest: 257" in said
    odd = load_config(small, ["parallel.tensor=2", "model.make_vocab_size_divisible_by=1"])
    assert "make_vocab_size_divisible_by: 1 pads the vocabulary to 257" in message(odd.with_vocab_size, 257)


def test_device(small: Path) -> None:
    config = load_config(small, ["train.precision=fp16"])
    config.check_device("cuda")
    assert 'train.precision: fp16 does not run on a CPU; nearest: "bf16"' in message(
        config.check_device, "cpu"
    )
    load_config(small).check_device("cpu")


def with_data(small: Path, *overrides: str) -> Config:
    for name in ("a.bin", "a.idx", "b_text_document.bin", "b_text_document.idx", "c.bin"):
        (small.parent / name).write_bytes(b"")
    return load_config(small, [f"data.train={small.parent}/a", *overrides])


def test_files_are_there(small: Path) -> None:
    folder = small.parent
    with_data(small, f'data.valid=[[1, "{folder}/a"], [2, "{folder}/b_text_document"]]').check_files()
    assert "data.train: is required to train" in message(load_config(small).check_files)
    said = message(with_data(small, f"data.valid={folder}/b").check_files)
    assert (
        f"data.valid: {folder}/b.bin and {folder}/b.idx: no such file; did you mean {folder}/b_text_doc"
        in said
    )
    said = message(with_data(small, f"data.test={folder}/a.bin").check_files)
    assert said.endswith(f"did you mean {folder}/a?")
    said = message(with_data(small, f'data.valid=["{folder}/a", "{folder}/c"]').check_files)
    assert said.splitlines()[1:] == [f"  data.valid: {folder}/c.idx: no such file"]


def test_tokenizer_files_are_there(small: Path) -> None:
    folder = small.parent
    (folder / "tok.json").write_text("{}")
    (folder / "gpt2-vocab.json").write_text("{}")
    for spec in (f"char:{folder}/tok.json", f"{folder}/tok.json", f"gpt2:{folder}", f"gpt2:{folder}/gpt2"):
        with_data(small, f"data.tokenizer={spec}").check_files()
    for spec in (f"hf:{folder}/none.json", f"{folder}/none.json", f"gpt2:{folder}/gpt3"):
        path = spec.partition(":")[2] or spec
        said = message(with_data(small, f"data.tokenizer={spec}").check_files)
        assert f"data.tokenizer: {path}: no such file" in said


def test_checkpoint_to_load_is_there(small: Path) -> None:
    with_data(small, f"checkpoint.load={small.parent}").check_files()
    said = message(with_data(small, "checkpoint.load=nowhere").check_files)
    assert "checkpoint.load: nowhere: no such folder" in said


def test_warnings(small: Path) -> None:
    assert load_config(small, ["parallel.pipeline=4"]).warnings(4) == []
    assert load_config(small, ["parallel.pipeline=4"]).warnings(16) == [
        "train.global_batch_size: 2 micro-batches on 4 pipeline stages leave the stages idle 60% of "
        "the time; "
        "32 or more is better"
    ]
    assert load_config(small, ["train.eval_interval=20", "checkpoint.interval=20"]).warnings(1) == []
    late = load_config(small, ["train.eval_interval=21", "checkpoint.interval=21"])
    assert late.warnings(1) == [
        "train.eval_interval: 21 is more than train.steps = 20",
        "checkpoint.interval: 21 is more than train.steps = 20",
    ]
