"""Text to token ids and back, behind one protocol. The only place that imports tokenizer libraries."""

from megatron_lite.tokenizers.base import SpecialTokens, Tokenizer, TokenizerError
from megatron_lite.tokenizers.flat import encode_flat
from megatron_lite.tokenizers.gigatoken import Encoder, GigatokenTokenizer, check_equal, load_fast_tokenizer
from megatron_lite.tokenizers.load import load_tokenizer
from megatron_lite.tokenizers.simple import ByteTokenizer, CharTokenizer, WordTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Encoder",
    "GigatokenTokenizer",
    "SpecialTokens",
    "Tokenizer",
    "TokenizerError",
    "WordTokenizer",
    "check_equal",
    "encode_flat",
    "load_fast_tokenizer",
    "load_tokenizer",
]
