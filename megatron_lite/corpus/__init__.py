"""From text to .bin/.idx: readers, cleaning, encoding. What tools/preprocess_data.py calls."""

from megatron_lite.corpus.chunk_encoder import EncodeSettings
from megatron_lite.corpus.clean import clean_text
from megatron_lite.corpus.encode import EncodeStats, KeyStats, encode_corpus
from megatron_lite.corpus.progress import Progress
from megatron_lite.corpus.python_docs import DocsStats, write_python_docs
from megatron_lite.corpus.reader import CorpusError
from megatron_lite.corpus.shards import Shard, join_shards

__all__ = [
    "CorpusError",
    "DocsStats",
    "EncodeSettings",
    "EncodeStats",
    "KeyStats",
    "Progress",
    "Shard",
    "clean_text",
    "encode_corpus",
    "join_shards",
    "write_python_docs",
]
