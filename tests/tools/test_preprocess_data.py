"""The command lines, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import IndexedDataset
from megatron_lite.tokenizers import CharTokenizer
from megatron_lite.tokenizers.train import train_bpe
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_preprocess_then_inspect(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "hello"}\n{"text": ""}\n{"text": "world, world"}\n')
    done = run(
        *("preprocess_data.py", "--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"),
        *("--append-eod", "--workers", 2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "documents read 3 = written 2 + empty 1 + rejected 0; 19 tokens" in done.stdout
    assert "MB/s" in done.stdout
    assert IndexedDataset(tmp_path / "x_text_document")[0].tolist() == [*b"hello", 256]

    done = run("inspect_data.py", "x_text_document", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "documents 3, sequences 2, tokens 19" in done.stdout and "uint16" in done.stdout
    assert "verified" in done.stdout and not (tmp_path / "index_cache").exists()


@pytest.mark.parametrize("order", ["epoch", "megatron"])
def test_inspect_dumps_the_training_samples(tmp_path: Path, order: str) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(40)))
    run(
        "preprocess_data.py",
        *["--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"],
        cwd=tmp_path,
    )
    arguments = f"x_text_document --seq-length 8 --split 8,2 --seed 7 --num-samples 90 --order {order}"
    done = run("inspect_data.py", *arguments.split(), "--dump", "out.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = np.load(tmp_path / "out.npz")["tokens"]
    assert tokens.shape == (90, 9) and tokens.dtype == np.int64

    from megatron_lite.config import DataConfig
    from megatron_lite.data import build_datasets

    config = DataConfig(train=str(tmp_path / "x_text_document"), split="8,2", order=order)  # type: ignore[arg-type]
    train, _, _ = build_datasets(config, 8, 7, 90)
    np.testing.assert_array_equal(tokens, train.batch(range(90)))


def test_bad_input_is_one_message_exit_2_and_no_output(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": "cut\n')
    arguments = ["--input", "x.jsonl", "--output-prefix", "x", "--tokenizer", "byte"]
    done = run("preprocess_data.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and "x.jsonl:2: not JSON" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    done = run("preprocess_data.py", *arguments, "--on-error", "skip", cwd=tmp_path)
    assert done.returncode == 3 and "rejected 1" in done.stdout and "x.jsonl:2: not JSON" in done.stderr
    for bad in (["--tokenizer", "bite"], ["--input", "absent"], ["--workers", "0"]):
        done = run("preprocess_data.py", *arguments, *bad, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, bad


def test_damaged_data_is_one_message_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text " * 100)
    run(
        "preprocess_data.py",
        *["--input", "x.txt", "--output-prefix", "x", "--tokenizer", "byte"],
        cwd=tmp_path,
    )
    path = tmp_path / "x_text_document.bin"
    path.write_bytes(path.read_bytes()[:-3])
    done = run("inspect_data.py", "x_text_document", cwd=tmp_path)
    assert done.returncode == 2 and "997 bytes" in done.stderr and "Traceback" not in done.stderr
    for bad in (["--num-samples", "3"], ["--dump", "x.npz"], ["--seq-length", "0"]):
        assert run("inspect_data.py", "x_text_document", *bad, cwd=tmp_path).returncode == 2, bad
    done = run("inspect_data.py", "absent", cwd=tmp_path)
    assert done.returncode == 2 and "absent.idx: no such file" in done.stderr


@pytest.mark.parametrize("tool", ["preprocess_data", "inspect_data"])
def test_the_tools_start_without_torch(tool: str) -> None:
    code = f"import sys; sys.path.insert(0, 'tools'); import {tool}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def preprocess(*arguments: object) -> int:
    return preprocess_data.main([*map(str, arguments)])


@pytest.fixture
def gpt2(tmp_path: Path) -> list[str]:
    """Megatron's flags for a vocabulary of GPT-2's kind, made here, under names of its own."""
    (tmp_path / "tok").mkdir()
    train_bpe(["the cat sat on the mat"] * 3, 270, tmp_path / "tok" / "tokenizer.json")
    model = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())["model"]
    (tmp_path / "v.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "m.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"])
    )
    (tmp_path / "x.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on the mat"}\n')
    return [
        "--input",
        f"{tmp_path}/x.jsonl",
        "--vocab-file",
        f"{tmp_path}/v.json",
        "--merge-file",
        f"{tmp_path}/m.txt",
    ]


def test_megatrons_command_lines_write_what_ours_write(tmp_path: Path, gpt2: list[str]) -> None:
    data = gpt2[:2]
    usual = [
        "--append-eod",
        "--workers",
        1,
        "--log-interval",
        1000,
        "--partitions",
        4,
        "--keep-sequential-samples",
    ]
    for name, flags in {
        "ours": ["--tokenizer", f"hf:{tmp_path}/tok"],
        "gpt2": ["--tokenizer-type", "GPT2BPETokenizer", *gpt2[2:], "--dataset-impl", "mmap"],
        "hf": ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "tok"],
    }.items():
        assert preprocess(*data, "--output-prefix", tmp_path / name, *flags, *usual) == 0
        for end in (".bin", ".idx"):
            own, ours = (tmp_path / f"{n}_text_document{end}" for n in (name, "ours"))
            assert own.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--tokenizer-type GPT2BPETokenizer --vocab-file v.json", "needs --merge-file"),
        (
            "--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model absent.model",
            "no such file or folder",
        ),
        (
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Llama-3.1-8B",
            "nothing is fetched",
        ),
        ("--tokenizer-type TikTokenizer --tokenizer-model v.json", "tiktoken:FILE"),
        ("--tokenizer-type BertWordPieceCase --vocab-file v.json", "hf:FILE"),
        ("--tokenizer-type NullTokenizer --vocab-size 100", "reads numbers"),
        ("--tokenizer-type GPT3", "invalid choice"),
        ("--tokenizer byte --tokenizer-type GPT2BPETokenizer", "give --tokenizer SPEC, or"),
        ("", "give --tokenizer SPEC, or"),
        ("--tokenizer byte --find-optimal-num-workers", "as many as there are cores"),
        ("--tokenizer byte --tokenizer-special-tokens <a> <b>", "in its own files"),
        ("--tokenizer byte --dataset-impl lazy", "invalid choice"),
        ("--tokenizer byte --keep-newlines", "for --split-sentences"),
        ("--tokenizer byte --special-tokens parse", "read no special tokens"),
        ("--tokenizer byte --encoder gigatoken", "byte-level BPE alone"),
        ("--tokenizer byte --shard 2/2", "--shard: 2/2: not I/N with I from 0 to N - 1"),
        ("--tokenizer byte --max-documents 0", "at least 1"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_reason(
    tmp_path: Path, gpt2: list[str], flags: str, reason: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        status = preprocess(*gpt2[:2], "--output-prefix", "o/x", *flags.split())
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2 and reason in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_special_tokens_that_megatron_would_add_are_not_left_out_in_silence(
    tmp_path: Path, gpt2: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tok" / "tokenizer.json"
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    flags = [*gpt2[:2], "--output-prefix", tmp_path / "x", "--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", path]
    assert preprocess(*flags) == 2 and "around every document" in capsys.readouterr().err
    assert preprocess(*flags, "--tokenizer-hf-no-include-special-tokens") == 0
    assert 0 not in IndexedDataset(tmp_path / "x_text_document")[0].tolist()


def test_shards_are_encoded_and_joined(
    tmp_path: Path, gpt2: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*gpt2[:2], "--tokenizer", "byte", "--workers", 1]
    assert preprocess(*flags, "--output-prefix", tmp_path / "one") == 0
    assert preprocess("--join", "--output-prefix", tmp_path / "x") == 2
    for shard in ("0/2", "1/2"):
        assert preprocess(*flags, "--output-prefix", tmp_path / "x", "--shard", shard) == 0
    assert preprocess("--join", "--output-prefix", tmp_path / "x") == 0
    assert "documents 2, tokens 21" in capsys.readouterr().out
    for end in (".bin", ".idx", ".json"):
        assert (tmp_path / f"x_text_document{end}").read_bytes() == (
            tmp_path / f"one_text_document{end}"
        ).read_bytes()


def test_training_refuses_data_of_another_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text " * 500)
    assert (
        preprocess("--input", tmp_path / "x.txt", "--output-prefix", tmp_path / "x", "--tokenizer", "byte")
        == 0
    )
    CharTokenizer.train(["some text"]).save(tmp_path / "char.json")
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", str(ROOT / "configs" / "tiny.json")]
    command += [
        "--set",
        f"data.train={tmp_path}/x_text_document",
        "--set",
        f"data.tokenizer=char:{tmp_path}/char.json",
    ]
    command += ["--set", f"train.output_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "made with another tokenizer, byte" in done.stderr
