"""What lets the benchmarks and GPU tests start on a machine that has torch and little else.

Importing this module puts the checkout on the path and, where pydantic is missing, a stand-in for the few parts of it
that `megatron_lite.config` uses: settings are then read, and not checked beyond unknown keys.
"""

import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
_MISSING: Any = object()


class ValidationError(ValueError):
    """Raised for a key that is unknown or missing; pydantic's would list all."""

    def errors(self) -> list[dict[str, Any]]:
        return []


class FieldInfo:
    """A field's default and annotation."""

    def __init__(self, default: Any = _MISSING, **about: Any) -> None:
        self.default, self.annotation = default, None
        self.description, self.examples = about.get("description"), about.get("examples")

    def is_required(self) -> bool:
        return self.default is _MISSING


class BaseModel:
    """A frozen record whose fields come from the annotations of its class."""

    model_fields: ClassVar[dict[str, FieldInfo]] = {}

    def __init_subclass__(cls) -> None:
        fields = dict(cls.model_fields)
        for name in inspect.get_annotations(cls):
            value = cls.__dict__.get(name, _MISSING)
            fields[name] = value if isinstance(value, FieldInfo) else FieldInfo(value)
        cls.model_fields = fields
        hints = get_type_hints(cls)  # annotations are strings there
        for name, field in fields.items():
            field.annotation = hints[name]

    def __init__(self, **values: Any) -> None:
        unknown = set(values) - set(self.model_fields)
        missing = {n for n, f in self.model_fields.items() if f.is_required()} - set(values)
        if unknown or missing:
            raise ValidationError(f"{type(self).__name__}: unknown {unknown}, missing {missing}")
        for name, field in self.model_fields.items():
            value = values.get(name, field.default)
            object.__setattr__(self, name, _as(field.annotation, value))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    @classmethod
    def model_validate_json(cls, text: str) -> Any:
        return cls(**json.loads(text))

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        return type(self)(**(vars(self) | update))


def _as(annotation: Any, value: Any) -> Any:
    """JSON's objects as sections, its lists as tuples."""
    if isinstance(value, list):
        return tuple(_as(None, item) for item in value)
    if isinstance(value, dict):
        options = (
            get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        )
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        return sections[0](**value) if sections else value
    return value


def _validator(*names: str, **about: Any) -> Callable[[Any], None]:
    return lambda function: None


def settings_are_checked() -> bool:
    """False where the stand-in took pydantic's place."""
    return not hasattr(sys.modules.get("pydantic"), "is_a_stand_in")


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("pydantic") is None:
    pydantic: Any = types.ModuleType("pydantic")
    pydantic.BaseModel, pydantic.Field, pydantic.ConfigDict = BaseModel, FieldInfo, dict
    pydantic.ValidationError, pydantic.field_validator = ValidationError, _validator
    pydantic.is_a_stand_in = True
    core: Any = types.ModuleType("pydantic_core")
    core.ErrorDetails = dict[str, Any]
    sys.modules.update(pydantic=pydantic, pydantic_core=core)
