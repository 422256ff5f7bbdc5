"""The tokenizer of a model as the files that Hugging Face's tools, vLLM and llama.cpp look for.

`tokenizer.json` (any tokenizer of the `tokenizers` library), `vocab.json` and `merges.txt` (GPT-2's),
`tokenizer.model` (SentencePiece's), and `tokenizer_config.json`, which names the class and the special tokens.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.huggingface.byte_level import of_bytes, of_tiktoken
from megatron_lite.checkpoint.huggingface.spm import (
    UNIGRAM,
    Model,
    UnknownModel,
    notes_of,
    of_sentencepiece,
    read_model,
)
from megatron_lite.checkpoint.reader import Reader
from megatron_lite.config import TOKENIZER_KINDS, ModelConfig
from megatron_lite.tokenizers import ByteTokenizer, Tokenizer, TokenizerError, load_tokenizer
from megatron_lite.tokenizers.gigatoken import hard_texts
from megatron_lite.tokenizers.huggingface import HuggingFaceTokenizer, find_gpt2_files
from megatron_lite.tokenizers.openai import TiktokenTokenizer
from megatron_lite.tokenizers.spm import SentencePieceTokenizer

FAST, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
GPT2_FILES = ("vocab.json", "merges.txt")
# What else lies in a folder of the Hub and belongs to the tokenizer.
_OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
FILES = (FAST, SENTENCEPIECE, SETTINGS, *GPT2_FILES, *_OTHERS)
# Release 4 of transformers also makes token_type_ids by itself, which its `generate` then refuses.
_INPUTS = ["input_ids", "attention_mask"]


class Tokens(NamedTuple):
    """A tokenizer to be written: what to say of it, ids for config.json ("eos_token_id"), and files by name."""

    note: str
    ids: dict[str, int]
    files: dict[str, bytes]


def tokenizer_of(folder: Path) -> str | None:
    """`data.tokenizer` for what lies in a Hugging Face folder; None where it holds none that we read."""
    if (folder / FAST).is_file():
        return f"hf:{folder}"
    if (folder / SENTENCEPIECE).is_file():
        return f"sentencepiece:{folder / SENTENCEPIECE}"
    return f"gpt2:{folder}" if all((folder / name).is_file() for name in GPT2_FILES) else None


def load_fitting(spec: str, model: ModelConfig) -> Tokenizer:
    """The tokenizer that `spec` names. Raises TokenizerError where it cannot be read, or has ids the model lacks."""
    assert model.vocab_size is not None, "what is imported or exported has a vocabulary"
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > model.vocab_size:
        fault = f"{spec} has {tokenizer.vocab_size} ids, and the model {model.vocab_size}"
        raise TokenizerError(f"{fault}; is it the one the model was trained with?")
    return tokenizer


def tokenizer_spec(reader: Reader) -> str | None:
    """`data.tokenizer` of the run that wrote a checkpoint."""
    spec: str | None = reader.metadata.get("config", {}).get("data", {}).get("tokenizer")
    return spec


def export_tokenizer(reader: Reader, given: str | None, target: Path, model: ModelConfig) -> Tokens:
    """The tokenizer `given`, or the checkpoint's own, as files of an export into `target`.

    Raises CheckpointError where the one given cannot be read, or has ids that the model lacks; of the checkpoint's
    own, whose files may be elsewhere by now, the note says it.
    """
    spec = given or tokenizer_spec(reader)
    if spec is None:
        return Tokens("none: the run had no data.tokenizer; --tokenizer SPEC names one", {}, {})
    try:
        tokenizer = load_fitting(spec, model)
    except TokenizerError as error:
        if given:
            raise CheckpointError(str(error)) from error
        return Tokens(f"none: {error}", {}, {})
    try:
        files = _files(spec, tokenizer, target)
    except UnknownModel as error:
        fault = f"{spec} has no tokenizer.json that gives its ids: {error}"
        if given:
            raise CheckpointError(f"{fault}; leave --tokenizer out") from error
        return Tokens(f"none: {fault}; readers have to take the file itself", {}, {})
    if not files:
        kind = spec.partition(":")[0]
        return Tokens(f"none: {kind} tokenizers have no Hugging Face form", {}, {})
    if SETTINGS not in files:
        files[SETTINGS] = _json(_settings(tokenizer, files, model))
    note = f"{spec} as {', '.join(files)}"
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.adds_tokens:
        note += "; by itself it puts special tokens around a text, which training here does not"
    if isinstance(tokenizer, SentencePieceTokenizer):
        note += "".join(f"; {line}" for line in notes_of(read_model(files[SENTENCEPIECE])))
    return Tokens(note, _ids(tokenizer, files), files)


def _files(spec: str, tokenizer: Tokenizer, target: Path) -> dict[str, bytes]:
    """Its files by name; none where it has no form of Hugging Face's."""
    kind, _, path = spec.partition(":")
    where = Path(path if kind in TOKENIZER_KINDS else spec)
    if isinstance(tokenizer, ByteTokenizer):
        return {FAST: _json(of_bytes(tokenizer))}
    if isinstance(tokenizer, TiktokenTokenizer):
        return {FAST: _json(of_tiktoken(tokenizer))}
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = where.read_bytes()
        # llama.cpp takes it before the other.
        return {FAST: _json(_of_sentencepiece(tokenizer, read_model(model))), SENTENCEPIECE: model}
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {}
    if kind == "gpt2" or (where.is_dir() and not (where / FAST).is_file()):
        pair = [file.read_bytes() for file in find_gpt2_files(path if kind == "gpt2" else where)]
        special = HuggingFaceTokenizer.load_gpt2(path if kind == "gpt2" else where, special_tokens="parse")
        return {FAST: special.to_json().encode()} | dict(zip(GPT2_FILES, pair, strict=True))
    folder = where if where.is_dir() else where.parent
    if where.is_file() and where.name != FAST:
        return {FAST: where.read_bytes()}
    found = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if SETTINGS in found and folder.resolve() != target.resolve():
        found[SETTINGS] = _rules_left_to_file(found[SETTINGS])
    return found


def _rules_left_to_file(data: bytes) -> bytes:
    """A tokenizer_config.json that names, instead of Llama's class, one that takes what tokenizer.json says.

    As training did: Llama's own makes the rules for spaces anew in release 5 of transformers.
    """
    settings = json.loads(data)
    if settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return data
    return _json(settings | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": _INPUTS})


def _of_sentencepiece(tokenizer: SentencePieceTokenizer, model: Model) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model. Raises UnknownModel where it would give other ids."""
    content = of_sentencepiece(model)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FAST).write_bytes(_json(content))
        theirs = HuggingFaceTokenizer.load(folder)
    for text in hard_texts():
        text = unicodedata.normalize("NFC", text) if model.table else text  # see notes_of
        ids, others = tokenizer.encode(text), theirs.encode(text)
        if ids != others and not (model.algorithm == UNIGRAM and sorted(ids) == sorted(others)):
            raise UnknownModel(f"it has others for {text[:40]!r}")
    return content


def _settings(tokenizer: Tokenizer, files: dict[str, bytes], model: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json. Nothing is put around a text, as in training."""
    settings: dict[str, Any] = {
        # Other classes have rules of their own, whatever tokenizer.json says.
        "tokenizer_class": "GPT2Tokenizer" if GPT2_FILES[0] in files else "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_positions,
        "model_input_names": _INPUTS,
    }
    if tokenizer.eod_id is not None:
        end = tokenizer.decode([tokenizer.eod_id])
        # A document begins where the one before it ended; GPT-2 has the same token for both, too.
        settings |= {"bos_token": end, "eos_token": end}
        if GPT2_FILES[0] in files:
            settings["unk_token"] = end
    if SENTENCEPIECE in files:
        named = read_model(files[SENTENCEPIECE])
        own = {"bos_token": named.first, "eos_token": named.last, "unk_token": named.unknown}
        settings |= {key: name for key, name in own.items() if name is not None}
    return settings


def _ids(tokenizer: Tokenizer, files: dict[str, bytes]) -> dict[str, int]:
    """Ids of the first and the last token, as tokenizer_config.json names them."""
    ids = (
        {} if tokenizer.eod_id is None else dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eod_id)
    )
    special: dict[str, int] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        special = tokenizer.special_ids
    elif isinstance(tokenizer, SentencePieceTokenizer):
        special = read_model(files[SENTENCEPIECE]).special_ids
    settings = json.loads(files[SETTINGS])
    for key in ("bos_token", "eos_token"):
        name = settings.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if name in special:
            ids[f"{key}_id"] = special[name]
    return ids


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
