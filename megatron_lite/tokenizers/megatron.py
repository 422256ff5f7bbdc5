"""Megatron's tokenizer flags to a specification of ours."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.tokenizers.base import TokenizerError
from megatron_lite.tokenizers.huggingface import HuggingFaceTokenizer

_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_NOT_HERE = {
    "BertWordPieceLowerCase": "BERT's; as a tokenizer.json it is --tokenizer hf:FILE",
    "BertWordPieceCase": "BERT's; as a tokenizer.json it is --tokenizer hf:FILE",
    "MultimodalTokenizer": "for images and text; text alone is its --tokenizer-model as hf:FOLDER",
    "NullMultimodalTokenizer": "for images and text, without a vocabulary",
    "NullTokenizer": "reads numbers, not text; IndexedDatasetWriter writes ids that are made already",
    "SFTTokenizer": "for conversations; its --tokenizer-model as hf:FOLDER encodes text",
}
TOKENIZER_TYPES = ("GPT2BPETokenizer", *_SENTENCEPIECE, "HuggingFaceTokenizer", "TikTokenizer", *_NOT_HERE)


def spec_of_megatron(
    kind: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    model: str | None = None,
    include_special_tokens: bool = True,
) -> str:
    """The specification of what Megatron builds of --tokenizer-type, --vocab-file, --merge-file, --tokenizer-model.

    include_special_tokens: without --tokenizer-hf-no-include-special-tokens Megatron lets a Hugging Face tokenizer put
        its own special tokens around every document, which is refused here where it would

    Raises TokenizerError with the reason, and what to take instead, for what there is no equal of.
    """
    if kind == "GPT2BPETokenizer":
        vocabulary, merges = (
            _given(kind, "--vocab-file", vocab_file),
            _given(kind, "--merge-file", merge_file),
        )
        return f"gpt2:{vocabulary},{merges}"
    if kind in _SENTENCEPIECE:
        return f"sentencepiece:{_given(kind, '--tokenizer-model', model)}"
    if kind == "HuggingFaceTokenizer":
        path = _given(kind, "--tokenizer-model", model)
        if include_special_tokens and HuggingFaceTokenizer.load(path).adds_tokens:
            raise TokenizerError(
                f"{path}: Megatron would put this tokenizer's special tokens around every document; here --append-eod "
                "alone adds one. Give --tokenizer-hf-no-include-special-tokens, with which both write the same"
            )
        return f"hf:{path}"
    if kind == "TikTokenizer":
        path = _given(kind, "--tokenizer-model", model)
        if not path.endswith(".tiktoken"):
            raise TokenizerError(
                f"{path}: Megatron's TikTokenizer numbers a JSON vocabulary anew, behind 1,000 special tokens; "
                "here it is --tokenizer tiktoken:FILE.tiktoken, with OpenAI's own ids, or hf:tokenizer.json"
            )
        return f"tiktoken:{path}"
    raise TokenizerError(f"--tokenizer-type {kind}: {_NOT_HERE[kind]}")


def _given(kind: str, flag: str, path: str | None) -> str:
    if path is None:
        raise TokenizerError(f"--tokenizer-type {kind} needs {flag}")
    if not Path(path).exists():
        raise TokenizerError(f"{flag} {path}: no such file or folder (nothing is fetched from a hub)")
    return path
