"""Cleaning rules for corpora, one theme a file, and the run over files. What tools/clean_corpus.py calls."""

from megatron_lite.corpus.cleaning.rules import build_rules, clean_document
from megatron_lite.corpus.cleaning.run import clean_corpus
from megatron_lite.corpus.cleaning.settings import CleaningSettings, load_settings

__all__ = ["CleaningSettings", "build_rules", "clean_corpus", "clean_document", "load_settings"]
