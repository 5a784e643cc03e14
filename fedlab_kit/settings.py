"""What a setting is: a field with its label, help text, range and group, and an error of one line that names it.

The validation messages, the widgets and the documentation are all made from that one place.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LONGEST = 400  # letters of another library's complaint


def knob(
    default: Any,
    label: str,
    group: str,
    *,
    step: float | None = None,
    span: tuple[float, float] | None = None,
    log: bool = False,
    source: str | None = None,
    when: dict[str, tuple[str, ...]] | None = None,
    **bounds: Any,
) -> Any:
    """Declare a field together with everything that a control needs to know about it; its docstring is the help text.

    `bounds` are pydantic's ge, gt, le, lt. `step` (1 for whole numbers unless given), `span` (the useful range) and
    `log` shape a slider, `source` names a catalog to choose from ("model", "dataset"), `when` says for which other
    settings the field matters.
    """
    step = step or (1 if type(default) is int else None)
    extra: dict[str, Any] = {"group": group, "step": step, "span": span, "log": log, "source": source, "when": when}
    return Field(default, title=label, json_schema_extra=extra, **bounds)


def complaint(error: Exception) -> str:
    """Say in one line what went wrong: in the error's own words, and with its type where nobody expected it."""
    kind = [] if isinstance(error, ValueError | OSError) and str(error) else [type(error).__name__]
    return ": ".join([*kind, *filter(None, [" ".join(str(error).split())[:LONGEST]])])


class FieldError(ValueError):
    """What is wrong with one `field` of some settings, in one line that begins with its name."""

    def __init__(self, field: str, rest: str) -> None:
        super().__init__(field, rest)
        self.field = field

    def __str__(self) -> str:
        return " ".join(self.args)


class Clash(FieldError):
    """Fields that are each allowed and do not go together."""


class Settings(BaseModel):
    """A frozen, validated value whose errors are one line: the field, what is allowed, and what came.

    Raises FieldError, a ValueError, on an unknown field, a wrong type, or a value out of range.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())  # a docstring is folded to the line

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _wrong(type(self), error) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated like a new value."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON-ready values (nested settings likewise)."""
        return self.model_dump(exclude_defaults=True)

    def in_effect(self) -> dict[str, Any]:
        """Return the fields that matter given the others, see `when` of `knob`, as JSON-ready values."""
        values = self.model_dump(mode="json")
        extra: Any = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        whens = {name: extra[name]["when"] or {} for name in values}
        return {n: v for n, v in values.items() if all(values[other] in among for other, among in whens[n].items())}

    def __str__(self) -> str:
        return repr(self)

    def __repr_args__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.changes()]


_LIMITS = {"Ge": ("at least", "ge"), "Gt": ("above", "gt"), "Le": ("at most", "le"), "Lt": ("below", "lt")}
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
_KINDS[tuple[int, ...]] = "numbers of classes, such as (3,)"


def _wrong(owner: type[Settings], error: ValidationError) -> FieldError:
    """Word the first validation error as one line that names the field, what is allowed and what came."""
    first = error.errors(include_url=False)[0]
    if isinstance(known := first.get("ctx", {}).get("error"), FieldError):
        return Clash(*known.args)
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return FieldError(name, f"is not a field of {owner.__name__}; its fields are {', '.join(owner.model_fields)}")
    return FieldError(name, f"must be {allowed(owner, name)}, got {first['input']!r}")


def allowed(owner: type[Settings], name: str) -> str:
    """Say in words which values a field takes, e.g. "at least 0 and below 1" or "one of fp32, fp16"."""
    field = owner.model_fields[name]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    rules = [(_LIMITS.get(type(rule).__name__), rule) for rule in field.metadata]
    limits = [f"{words[0]} {getattr(rule, words[1])}" for words, rule in rules if words]
    kind = _KINDS.get(field.annotation, re.sub(r"(\w+\.)+", "a ", str(field.annotation)))  # type: ignore[arg-type]
    whole = [kind] if not limits or field.annotation is int else []
    return ", ".join([*whole, *([" and ".join(limits)] if limits else [])])
