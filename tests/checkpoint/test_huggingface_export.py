"""Exports: what is in the folder, what the checks find, and that nothing is lost."""

import base64
import json
import shutil
import weakref

import pytest
import safetensors.torch
import torch

from megatron_lite.checkpoint import CheckpointError, Reader
from megatron_lite.checkpoint.huggingface import (
    check,
    check_export,
    check_round_trip,
    compare_logits,
    export_huggingface,
    import_huggingface,
    tokenizer_of,
)
from megatron_lite.checkpoint.huggingface.byte_level import of_tiktoken
from megatron_lite.checkpoint.huggingface.check import TEXTS
from megatron_lite.tokenizers import CharTokenizer, load_tokenizer
from megatron_lite.tokenizers.gigatoken import hard_texts
from tests.checkpoint.huggingface_models import LLAMA3_SCALING, OURS, ours, transformers
from tools.convert_checkpoint import main as convert
from tools.generate import main as generate


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", OURS)
def test_transformers_continues_a_text_as_generate_does(tmp_path, name, capsys):
    """Vocabulary of 259 in 384 rows, tied and untied, with and without grouped queries."""
    _, step = ours(name, tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    lines = check_export(step, tmp_path / "hf")
    assert "come back bit by bit" in lines[0] and "logits differ from ours by at most" in lines[1]
    assert compare_logits(step, tmp_path / "hf") < 1e-5
    prompt = "It's 12 o'clock"
    asked = ["--load", str(tmp_path / "run"), "--prompt", prompt, "--temperature", "0", "--device", "cpu"]
    capsys.readouterr()
    assert generate([*asked, "--max-new-tokens", "40"]) == 0
    mine = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    if name == "qwen2":  # see test_a_tokenizer_that_transformers_reads_by_rules_of_its_own
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, suppress_tokens=[257, 258], pad_token_id=256
    )
    assert len(set(ids[0].tolist())) > 5, "a text worth comparing"
    # Both stop at the end of a document; generate.py does not print it.
    assert tokenizer.decode(ids[0]).removesuffix("<|endoftext|>") + "\n" == mine


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_weights_are_rounded_to_the_type_asked_for(tmp_path, dtype, bits):
    _, step = ours("llama-gqa", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf", dtype=dtype)
    assert read(tmp_path / "hf" / "config.json")["torch_dtype"] == bits
    stored = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    with Reader(step) as reader:
        assert torch.equal(stored["lm_head.weight"], reader.read("head.weight")[:259].to(dtype))
    lines = check_export(step, tmp_path / "hf")
    assert f"in {bits}, come back bit by bit" in lines[0]
    # Against the unrounded weights it would be a thousand times as much.
    assert compare_logits(step, tmp_path / "hf") < 1e-5


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 1])
def test_every_parameter_is_read_once_and_forgotten(tmp_path, monkeypatch, shard_bytes):
    """Queries, keys and values are three tensors of one parameter of ours; shards of one tensor each do not matter."""
    _, step = ours("llama-gqa", tmp_path / "run")
    names, last = [], None
    read_whole = Reader.read

    def counted(self, name, *args, **kwargs):
        nonlocal last
        assert last is None or last() is None, f"{names[-1]} is still in memory"
        names.append(name)
        weight = read_whole(self, name, *args, **kwargs)
        last = weakref.ref(weight)
        return weight

    monkeypatch.setattr(Reader, "read", counted)
    exported = export_huggingface(step, tmp_path / "hf", shard_bytes=shard_bytes)
    with Reader(step) as reader:
        assert sorted(names) == reader.names()
    assert len(exported.files) == (1 if shard_bytes > 1 else 21)


def test_a_model_larger_than_memory_is_checked_as_far_as_it_can_be(tmp_path, monkeypatch):
    model, step = ours("llama-gqa", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    monkeypatch.setattr(check, "compare_logits", lambda *_: pytest.fail("memory would not be enough"))
    monkeypatch.setattr(check, "available_bytes", lambda: 4 * model.parameter_count())
    lines = check_export(step, tmp_path / "hf")
    assert (
        "bit by bit" in lines[0]
        and "not checked: transformers' logits, since the model in fp32 needs" in lines[1]
    )
    assert "the same ids" in lines[2]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gpt2", {"ffn_hidden_size": 96}, "llama.cpp reads only a GPT-2 whose feed-forward part"),
        ("gpt2-untied", {}, "llama.cpp computes gelu by its tanh"),
        ("qwen2", {"kv_channels": 16}, "vLLM takes hidden_size / num_attention_heads"),
        (
            "qwen3",
            {"rotary_scaling": LLAMA3_SCALING},
            "llama.cpp knows rotary scaling of type llama3 in Llama",
        ),
    ],
)
def test_what_other_readers_compute_otherwise_is_said(tmp_path, name, changes, says):
    _, step = ours(name, tmp_path / "run", **changes)
    export_huggingface(step, tmp_path / "hf")
    assert [line for line in check_export(step, tmp_path / "hf") if line.startswith(f"note: {says}")]


def test_nothing_is_said_where_all_readers_agree(tmp_path):
    for name in ("gpt2", "llama-gqa", "llama3-tied", "qwen2", "qwen3"):
        _, step = ours(name, tmp_path / name / "run")
        assert check.reader_notes(export_huggingface(step, tmp_path / name / "hf").config) == []


def test_a_weight_too_large_for_fp16_is_refused_and_nothing_is_left(tmp_path):
    _, step = ours("gpt2", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = -70000.0
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    step = import_huggingface(tmp_path / "hf", tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"linear_fc1.bias holds 7e\+04, .* export it as bf16 or fp32"):
        export_huggingface(step, tmp_path / "half", dtype=torch.float16)
    assert not list((tmp_path / "half").glob("*.safetensors"))
    export_huggingface(step, tmp_path / "half", dtype=torch.bfloat16)
    check_round_trip(step, tmp_path / "half")


def change(folder, name, edit):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name] = edit(tensors[name])
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "edit"),
    [
        ("transformer.h.1.attn.c_attn.weight", lambda t: t.flip(0)),
        ("transformer.ln_f.bias", lambda t: t.nextafter(t + 1)),
        ("transformer.h.0.ln_1.bias", lambda t: t + 1e-3),  # of zeros, which ours lacks
        ("transformer.wte.weight", lambda t: t.neg()),
    ],
)
def test_the_round_trip_finds_one_bit(tmp_path, tensor, edit):
    lacking = {"add_bias_linear": "h.0.ln_1" not in tensor}
    _, step = ours("gpt2", tmp_path / "run", **lacking)
    export_huggingface(step, tmp_path / "hf")
    assert "come back bit by bit" in check_round_trip(step, tmp_path / "hf")
    change(tmp_path / "hf", tensor, edit)
    with pytest.raises(
        CheckpointError, match=r"the export is wrong: .* comes back with other bits; do not use it"
    ):
        check_export(step, tmp_path / "hf")


def test_nan_and_minus_zero_are_bits_like_others(tmp_path):
    _, step = ours("gpt2", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    change(tmp_path / "hf", "transformer.ln_f.bias", lambda t: -0.0 * t.abs())
    change(tmp_path / "hf", "transformer.ln_f.weight", lambda t: t * float("nan"))
    step = import_huggingface(tmp_path / "hf", tmp_path / "back")
    export_huggingface(step, tmp_path / "again")
    check_round_trip(step, tmp_path / "again")
    change(tmp_path / "again", "transformer.ln_f.bias", lambda t: t.abs())
    with pytest.raises(CheckpointError, match=r"norm.bias comes back with other bits"):
        check_round_trip(step, tmp_path / "again")


def test_the_vocabulary_padding_is_stripped_and_restored(tmp_path):
    """Rows 259 to 383 of ours hold numbers (training leaves them); there are 259 in the export, zeros after import."""
    model, step = ours("llama-gqa", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    again = import_huggingface(tmp_path / "hf", tmp_path / "back")
    with Reader(step) as before, Reader(again) as after:
        assert before.read("head.weight")[259:].any() and model.padded_vocab_size == 384
        for name in ("embed.weight", "head.weight"):
            assert torch.equal(before.read(name)[:259], after.read(name)[:259])
            assert after.shape(name) == (384, 32) and not after.read(name)[259:].any()


def gpt2_files(folder):
    """A small vocabulary in GPT-2's pair of files."""
    byte = json.loads((folder.parent / "bytes.json").read_text())["model"]["vocab"]
    letters = {number: letter for letter, number in byte.items()}
    vocabulary = {letters[number]: number for number in range(256)}
    merges = ["t h", "th e", "Ġ the", "1 2"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return f"gpt2:{folder}"


@pytest.fixture
def specs(tmp_path):
    """Tokenizers of every kind that has a Hugging Face form and needs no file of others."""
    _, step = ours("gpt2", tmp_path / "bytes")
    export_huggingface(step, tmp_path / "bytes-hf")
    shutil.copy(tmp_path / "bytes-hf" / "tokenizer.json", tmp_path / "bytes.json")
    return {
        "byte": "byte",
        "gpt2": gpt2_files(tmp_path / "gpt2"),
        "hf": f"hf:{tmp_path / 'bytes.json'}",
        "folder": f"hf:{tmp_path / 'bytes-hf'}",
    }


@pytest.mark.parametrize("kind", ["byte", "gpt2", "hf", "folder"])
@pytest.mark.parametrize("family", ["gpt2", "llama-gqa", "qwen3"])
def test_the_tokenizer_goes_along_and_is_found_again(tmp_path, specs, kind, family):
    _, step = ours(family, tmp_path / "run", specs[kind], vocab_size=300)
    exported = export_huggingface(step, tmp_path / "hf")
    assert f"{specs[kind]} as tokenizer.json" in exported.tokenizer
    assert "transformers reads the same ids" in check_export(step, tmp_path / "hf")[-1]
    eod = load_tokenizer(specs[kind]).eod_id
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == theirs.bos_token_id == eod and len(theirs) <= 300
    assert theirs("x").input_ids == load_tokenizer(specs[kind]).encode("x"), "nothing is put around a text"
    if kind != "folder":  # whose own settings go along
        # Llama's code in release 4 of transformers refuses token_type_ids.
        assert read(tmp_path / "hf" / "tokenizer_config.json")["model_input_names"] == list(theirs("x"))
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "hf" / name)["eos_token_id"] == eod
    with Reader(import_huggingface(tmp_path / "hf", tmp_path / "back")) as reader:
        found = reader.metadata["config"]["data"]["tokenizer"]
    assert found == tokenizer_of(tmp_path / "hf") == f"hf:{tmp_path / 'hf'}"
    for text in TEXTS:
        assert load_tokenizer(found).encode(text) == load_tokenizer(specs[kind]).encode(text)
        assert theirs.decode(theirs(text).input_ids) == text


def test_an_export_into_the_tokenizers_own_folder_leaves_its_files(tmp_path, specs):
    folder = tmp_path / "bytes-hf"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    before = (folder / "tokenizer.json").read_bytes()
    _, step = ours("llama-gqa", tmp_path / "run", specs["folder"])
    assert "tokenizer.json, tokenizer_config.json" in export_huggingface(step, folder).tokenizer
    assert (folder / "tokenizer.json").read_bytes() == before
    assert "the same ids" in check_export(step, folder)[-1]


def test_gpt2s_own_files_are_copied_and_found(tmp_path, specs):
    _, step = ours("gpt2", tmp_path / "run", specs["gpt2"], vocab_size=300)
    export_huggingface(step, tmp_path / "hf")
    assert (tmp_path / "hf" / "vocab.json").read_bytes() == (tmp_path / "gpt2" / "encoder.json").read_bytes()
    assert (tmp_path / "hf" / "merges.txt").read_bytes() == (tmp_path / "gpt2" / "vocab.bpe").read_bytes()
    (end,) = read(tmp_path / "hf" / "tokenizer.json")["added_tokens"]
    assert end["content"] == "<|endoftext|>" and end["special"]
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert tokenizer_of(tmp_path / "hf") == f"gpt2:{tmp_path / 'hf'}"


def tiktoken_file(path):
    """Bytes, and tokens that merges reach, or (the last but one) do not."""
    pytest.importorskip("tiktoken")
    tokens = [bytes((byte,)) for byte in range(256)]
    tokens += [b"th", b" q", b"the", b" qu", b"12", b"345", b"!!", b"\xd0\x9f", b"zxq", b" t"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"tiktoken:{path}"


def test_a_tiktoken_file_becomes_tokenizer_json(tmp_path):
    spec = tiktoken_file(tmp_path / "r50k_small.tiktoken")
    _, step = ours("llama-gqa", tmp_path / "run", spec, vocab_size=50257, num_layers=1)
    exported = export_huggingface(step, tmp_path / "hf")
    assert exported.tokenizer == f"{spec} as tokenizer.json, tokenizer_config.json"
    assert exported.config["eos_token_id"] == 50256
    assert "the same ids" in check_export(step, tmp_path / "hf")[-1]


@pytest.mark.parametrize("kind", ["r50k", "cl100k", "o200k"])
def test_ids_of_tiktoken_files_are_kept(tmp_path, kind):
    tokenizer = load_tokenizer(tiktoken_file(tmp_path / f"{kind}_small.tiktoken"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(of_tiktoken(tokenizer)))
    theirs = load_tokenizer(f"hf:{tmp_path}")
    assert theirs.eod_id == tokenizer.eod_id and theirs.special_ids == tokenizer.special_ids
    for text in [*TEXTS, *hard_texts(), "zxq zxqzxq the quTHE'S 12345", "<|endoftext|>"]:
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text)) == text


def test_a_sentencepiece_model_is_copied(tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    texts = iter(["the quick brown fox jumps over the lazy dog"] * 50)
    trainer.train(
        sentence_iterator=texts,
        model_prefix=str(tmp_path / "sp"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=9,
    )
    spec = f"sentencepiece:{tmp_path / 'sp.model'}"
    _, step = ours("llama-gqa", tmp_path / "run", spec)
    exported = export_huggingface(step, tmp_path / "hf")
    assert exported.tokenizer.startswith(f"{spec} as tokenizer.json, tokenizer.model, tokenizer_config.json")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()
    assert read(tmp_path / "hf" / "config.json")["eos_token_id"] == 2
    assert "the same ids" in check_export(step, tmp_path / "hf")[-1]
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert tokenizer_of(tmp_path / "hf") == f"sentencepiece:{tmp_path / 'hf' / 'tokenizer.model'}"


def test_a_tokenizer_that_transformers_reads_by_rules_of_its_own(tmp_path, specs, capsys):
    """Release 5 has Qwen2Tokenizer for every model_type "qwen2", which takes digits one by one. The export says so, and
    ends with an error."""
    _, step = ours("qwen2", tmp_path / "run", specs["gpt2"], vocab_size=300)
    asked = ["--load", str(step), "--save", str(tmp_path / "hf"), "--to", "hf"]
    status, said = convert(asked), capsys.readouterr()
    if "the same ids" not in said.out:
        assert status == 2 and "by Qwen2Tokenizer's own rules; take PreTrainedTokenizerFast" in said.out
        assert "the weights are right, but transformers' AutoTokenizer gives other ids" in said.err
    else:
        assert status == 0
    assert convert([*asked[:-3], str(tmp_path / "unchecked"), *asked[-2:], "--no-check"]) == 0


def test_a_wrong_tokenizer_json_is_found(tmp_path):
    _, step = ours("llama-gqa", tmp_path / "run")
    export_huggingface(step, tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    content = read(file)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json gives other ids than byte for 'The quick"):
        check_export(step, tmp_path / "hf")


def test_where_there_is_no_tokenizer_the_export_says_why(tmp_path):
    CharTokenizer("abc").save(tmp_path / "chars.json")
    _, step = ours("gpt2", tmp_path / "run", f"char:{tmp_path / 'chars.json'}")
    assert (
        export_huggingface(step, tmp_path / "hf").tokenizer
        == "none: char tokenizers have no Hugging Face form"
    )
    assert len(check_export(step, tmp_path / "hf")) == 2 and tokenizer_of(tmp_path / "hf") is None
    assert read(tmp_path / "hf" / "generation_config.json") == {}
    _, step = ours("gpt2", tmp_path / "moved", "hf:/nowhere")
    assert "cannot be read" in export_huggingface(step, tmp_path / "hf2").tokenizer
    assert "as tokenizer.json" in export_huggingface(step, tmp_path / "hf3", tokenizer="byte").tokenizer
    with pytest.raises(CheckpointError, match=r"/nowhere.*cannot be read"):
        export_huggingface(step, tmp_path / "hf4", tokenizer="hf:/nowhere")
    _, step = ours("gpt2", tmp_path / "small", "byte", vocab_size=200)
    assert "byte has 257 ids, and the model 200" in export_huggingface(step, tmp_path / "hf5").tokenizer


def test_real_tokenizers_go_along(tmp_path, real_data):
    folder = real_data / "tokenizers"
    _, step = ours("gpt2", tmp_path / "gpt2", f"gpt2:{folder}/gpt2-", vocab_size=50257, num_layers=1)
    export_huggingface(step, tmp_path / "gpt2-hf")
    assert "the same ids" in check_export(step, tmp_path / "gpt2-hf")[-1]
    spec = f"sentencepiece:{folder}/mistral-v1-32000.model"
    _, step = ours("llama-gqa", tmp_path / "llama", spec, vocab_size=32000, num_layers=1)
    export_huggingface(step, tmp_path / "llama-hf")
    assert "the same ids" in check_export(step, tmp_path / "llama-hf")[-1]
