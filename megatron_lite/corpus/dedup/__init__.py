"""Deduplication and decontamination of a corpus. What tools/dedup_corpus.py calls."""

from megatron_lite.corpus.dedup.decontaminate import Decontaminate
from megatron_lite.corpus.dedup.exact import Exact, Lines
from megatron_lite.corpus.dedup.minhash import MinHash
from megatron_lite.corpus.dedup.run import dedup_corpus
from megatron_lite.corpus.dedup.substrings import Substrings

__all__ = ["Decontaminate", "Exact", "Lines", "MinHash", "Substrings", "dedup_corpus"]
