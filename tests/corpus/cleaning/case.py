"""Settings with one rule, for tests that look at one threshold."""

import json
from typing import Any, get_args

from megatron_lite.corpus.cleaning import CleaningSettings, build_rules, clean_document
from megatron_lite.corpus.cleaning.rules import Outcome


def only(rule: str, **values: Any) -> CleaningSettings:
    """`rule` alone, with these values; its other switches and thresholds are off."""
    tree: dict[str, Any] = {name: {"enabled": False} for name in CleaningSettings.model_fields}
    section: dict[str, Any] = {"enabled": True}
    for name, field in type(getattr(CleaningSettings(), rule)).model_fields.items():
        if name != "enabled" and isinstance(field.default, bool):
            section[name] = False
        elif type(None) in get_args(field.annotation):
            section[name] = None
    tree[rule] = section | values
    return CleaningSettings.model_validate_json(json.dumps(tree))


def clean(text: str, rule: str, **values: Any) -> Outcome:
    return clean_document(text, build_rules(only(rule, **values)))


def dropped(text: str, rule: str, **values: Any) -> str | None:
    """What dropped the text, without the rule's name; None where it stayed."""
    outcome = clean(text, rule, **values)
    return outcome.dropped.check.removeprefix(f"{rule}.") if outcome.dropped else None
