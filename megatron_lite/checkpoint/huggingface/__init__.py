"""Hugging Face models, both ways: GPT-2, Llama, Mistral (imported), Qwen2 and Qwen3 (dense).

`config` maps config.json, `weights` says which tensor is which, `convert` streams folders, `check` compares
logits.
"""

from megatron_lite.checkpoint.huggingface.check import build_model, compare_logits
from megatron_lite.checkpoint.huggingface.config import from_huggingface, to_huggingface
from megatron_lite.checkpoint.huggingface.convert import export_huggingface, import_huggingface, model_config
from megatron_lite.checkpoint.huggingface.weights import Rule, rules

__all__ = [
    "Rule",
    "build_model",
    "compare_logits",
    "export_huggingface",
    "from_huggingface",
    "import_huggingface",
    "model_config",
    "rules",
    "to_huggingface",
]
