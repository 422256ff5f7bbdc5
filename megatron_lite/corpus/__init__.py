"""From text to .bin/.idx: readers, cleaning, encoding. What tools/preprocess_data.py calls."""

from megatron_lite.corpus.clean import clean_text
from megatron_lite.corpus.encode import EncodeStats, KeyStats, encode_corpus
from megatron_lite.corpus.python_docs import DocsStats, write_python_docs
from megatron_lite.corpus.reader import CorpusError

__all__ = [
    "CorpusError",
    "DocsStats",
    "EncodeStats",
    "KeyStats",
    "clean_text",
    "encode_corpus",
    "write_python_docs",
]
