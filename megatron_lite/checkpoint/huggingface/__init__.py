"""Hugging Face models, both ways: GPT-2, Llama, Mistral, Qwen2 and Qwen3 (dense).

`config` maps config.json, `weights` says which tensor is which, `folder` reads what lies in a folder, `importing` and
`exporting` stream, `tokenizer` writes the tokenizer's files, `check` judges an export.
"""

from megatron_lite.checkpoint.huggingface.check import (
    build_model,
    check_export,
    check_round_trip,
    compare_logits,
)
from megatron_lite.checkpoint.huggingface.config import ARCHITECTURES, from_huggingface, to_huggingface
from megatron_lite.checkpoint.huggingface.exporting import (
    EXPORT_DTYPES,
    Exported,
    check_free,
    export_huggingface,
    model_config,
)
from megatron_lite.checkpoint.huggingface.importing import import_huggingface
from megatron_lite.checkpoint.huggingface.tokenizer import tokenizer_of
from megatron_lite.checkpoint.huggingface.weights import Rule, rules

__all__ = [
    "ARCHITECTURES",
    "EXPORT_DTYPES",
    "Exported",
    "Rule",
    "build_model",
    "check_export",
    "check_free",
    "check_round_trip",
    "compare_logits",
    "export_huggingface",
    "from_huggingface",
    "import_huggingface",
    "model_config",
    "rules",
    "to_huggingface",
    "tokenizer_of",
]
