"""What every section shares: strict types, no unknown keys, no change after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A frozen part of the tree. Types are strict; only an integer may stand for a float."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def alias(field: str, aliases: Mapping[str, str] | None = None) -> Any:
    """A validator that reads the choices of `field` without regard to case, and other names people use."""

    def canonical(cls: type[BaseModel], value: object) -> object:
        if not isinstance(value, str):
            return value
        lower = value.lower()
        legal = {name.lower(): name for name in choices(cls, field)}
        return legal.get(lower, (aliases or {}).get(lower, value))

    return field_validator(field, mode="before")(classmethod(canonical))


def choices(section: type[BaseModel], field: str) -> tuple[str, ...]:
    """The legal words of a Literal field."""
    return tuple(getattr(section.model_fields[field].annotation, "__args__", ()))
