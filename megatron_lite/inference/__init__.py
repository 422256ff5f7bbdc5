"""Text from a trained model: any checkpoint loaded for inference, and generation with a key/value cache."""

from megatron_lite.inference.generate import check_prompts, generate
from megatron_lite.inference.load import load_model, open_tokenizer, read_config

__all__ = ["check_prompts", "generate", "load_model", "open_tokenizer", "read_config"]
