"""Text to token ids and back, behind one protocol. The only place that imports tokenizer libraries."""

from megatron_lite.tokenizers.base import Tokenizer, TokenizerError
from megatron_lite.tokenizers.load import load_tokenizer
from megatron_lite.tokenizers.simple import ByteTokenizer, CharTokenizer, WordTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Tokenizer",
    "TokenizerError",
    "WordTokenizer",
    "load_tokenizer",
]
