"""Which tokenizer an import says that its weights were trained with."""

import json

import pytest

from megatron_lite.checkpoint import Reader
from megatron_lite.checkpoint.huggingface import export_huggingface, import_huggingface
from megatron_lite.config import load_config
from megatron_lite.tokenizers import load_tokenizer
from megatron_lite.training.saving import TOKENIZER
from tests.checkpoint.huggingface_models import ours
from tests.checkpoint.test_killed_exports import gpt2_files


def imported(folder, spec, *gone):
    """The metadata and the configuration of an import of an export; `gone` of its tokenizer's files are not there."""
    _, step = ours("llama-gqa", folder, spec, vocab_size=32000, num_layers=1)
    export_huggingface(step, folder / "hf")
    for name in gone:
        (folder / "hf" / name).unlink()
    with Reader(import_huggingface(folder / "hf", folder / "back")) as reader:
        return reader.metadata, load_config(folder / "back" / "config.json")


@pytest.mark.parametrize("kind", ["hf", "gpt2", "sentencepiece"])
def test_the_fingerprint_is_that_of_a_run_of_the_configuration(tmp_path, kind, request):
    if kind == "sentencepiece":
        folder = request.getfixturevalue("real_data") / "tokenizers"
        spec = f"sentencepiece:{folder}/mistral-v1-32000.model"
    else:
        spec = gpt2_files(tmp_path / "pair")
    metadata, config = imported(tmp_path / "run", spec, *([] if kind == "hf" else ["tokenizer.json"]))
    assert config.data.tokenizer.startswith(f"{kind}:{tmp_path}")
    assert metadata[TOKENIZER] == load_tokenizer(config.data.tokenizer).fingerprint()
    # The files of the export are copies; tokenizer.json was made from them.
    assert (metadata[TOKENIZER] == load_tokenizer(spec).fingerprint()) == (kind != "hf")


@pytest.mark.parametrize(
    ("ids", "says"), [(None, "not a tokenizer.json"), (32001, "has 32001 ids, and the model 32000")]
)
def test_no_fingerprint_of_a_tokenizer_that_no_run_could_have(tmp_path, caplog, ids, says):
    _, step = ours("llama-gqa", tmp_path / "run", None, vocab_size=32000, num_layers=1)
    export_huggingface(step, tmp_path / "hf")
    model = {
        "type": "WordLevel",
        "vocab": {str(number): number for number in range(ids or 0)},
        "unk_token": "0",
    }
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": model} if ids else {}))
    with Reader(import_huggingface(tmp_path / "hf", tmp_path / "back")) as reader:
        assert TOKENIZER not in reader.metadata
    assert "the folder's tokenizer cannot be used: " in caplog.text and says in caplog.text


def test_no_fingerprint_without_a_tokenizer(tmp_path, caplog):
    metadata, config = imported(tmp_path, None)
    assert TOKENIZER not in metadata and config.data.tokenizer is None and not caplog.records
