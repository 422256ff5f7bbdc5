"""Language identification without network: py3langid, some 140 languages, a model inside the package."""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron_lite.corpus.cleaning.page import Drop, Edit, Page, Rule
from megatron_lite.corpus.cleaning.settings import LanguageSettings
from megatron_lite.corpus.files import CorpusError, require


def language_rule(settings: LanguageSettings) -> Rule:
    """Drops texts in other languages than allowed, or with too little certainty; stores both where asked."""
    identifier = _load_identifier()
    allowed = frozenset(settings.allowed)
    if unknown := sorted(allowed - set(identifier.labels)):
        raise CorpusError(
            f"language.allowed: {', '.join(unknown)} is not known; take {', '.join(sorted(identifier.labels))}"
        )

    def rule(page: Page) -> Drop | Edit | None:
        start = max(0, (len(page.text) - settings.characters) // 2)
        language, probability = identifier.classify(page.text[start : start + settings.characters])
        probability = round(float(probability), 4)
        if allowed and language not in allowed:
            return Drop("allowed", f"{language} ({probability:.2f}), not {', '.join(settings.allowed)}")
        if probability < settings.min_probability:
            return Drop(
                "min_probability", f"{language} with {probability:.2f}, under {settings.min_probability}"
            )
        if settings.store is None:
            return None
        fields = {settings.store: language, f"{settings.store}_probability": probability}
        return Edit(page.text, [], fields)

    return rule


@cache
def _load_identifier() -> Any:
    """The library's LanguageIdentifier with probabilities; loading takes half a second."""
    langid = require("py3langid.langid", "the language rule")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
