"""The JSON Schema of a configuration file, for editors."""

from __future__ import annotations

from typing import Any

from .deepspeed_keys import TOP_LEVEL_KEYS, ZERO_KEYS
from .deepspeed_section import REFUSED_KEYS
from .tree import Config

_TYPES = {"true or false": "boolean", "a whole number": "number", "an object": "object"}


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) that `configs/schema.json` holds; `load_config` checks more than it says."""
    schema = Config.model_json_schema()
    properties = {"$schema": {"type": "string", "description": "this schema's location, for editors"}}
    schema["properties"] = properties | schema["properties"]
    deepspeed: dict[str, Any] = {key: {} for key in sorted(TOP_LEVEL_KEYS - REFUSED_KEYS.keys())}
    deepspeed["zero_optimization"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: {"type": [_TYPES[kind], "string"]} for key, kind in sorted(ZERO_KEYS.items())}
        | {"stage": {"enum": [0, 1, 2, 3], "description": "ZeRO stage; without it 1"}},
    }
    schema["properties"]["deepspeed"] |= {"additionalProperties": False, "properties": deepspeed}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megatron_lite configuration",
        "description": "Every setting of a run.",
    }
    return schema | head
