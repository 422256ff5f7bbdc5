"""Documents into sentences, as Megatron's preprocess_data --split-sentences does it: NLTK's Punkt."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_lite.corpus.files import CorpusError

_MOST = 1_000_000  # characters at once, as in Megatron

# Megatron's: "\s*" takes the line ends into the sentence, so that Punkt does not eat them.
_KEEPING_NEWLINES = r"""
    \S*                          # some word material
    %(SentEndChars)s             # a potential sentence ending
    \s*
    (?=(?P<after_tok>
        %(NonWord)s              # either other punctuation
        |
        (?P<next_tok>\S+)        # or some other token
    ))"""


def sentence_splitter(language: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """A function from a text to its sentences. Raises CorpusError where NLTK or the language's model is missing."""
    try:
        punkt = importlib.import_module("nltk.tokenize.punkt")
    except ImportError:
        raise CorpusError(
            "--split-sentences needs the package nltk: pip install nltk; leave it out for GPT training, which takes "
            "whole documents"
        ) from None
    splitter = _load(punkt, language)
    if keep_newlines:
        own = type("LanguageVars", (punkt.PunktLanguageVars,), {"_period_context_fmt": _KEEPING_NEWLINES})
        splitter = punkt.PunktSentenceTokenizer(train_text=splitter._params, lang_vars=own())

    def split(text: str) -> list[str]:
        parts = (text[start : start + _MOST] for start in range(0, len(text), _MOST))
        return [sentence for part in parts for sentence in splitter.tokenize(part)]

    return split


def _load(punkt: Any, language: str) -> Any:
    if not hasattr(punkt, "PunktTokenizer"):
        raise CorpusError("--split-sentences needs nltk 3.9 or later: pip install -U nltk")
    try:
        return punkt.PunktTokenizer(language)
    except LookupError:
        raise CorpusError(
            f"--lang {language}: NLTK has no model of it here: python -m nltk.downloader punkt_tab, where there is a "
            "network; the folder it makes (nltk_data) can be copied"
        ) from None
