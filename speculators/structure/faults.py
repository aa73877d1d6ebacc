"""Faults of a value and their messages: what was found, what is allowed, the near miss."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import attrs

from speculators.registry import near_miss
from speculators.structure.origin import Part

# A measured number. NaN stands for "nothing was counted"; JSON has no NaN, so it is null there.
FloatOrNaN = Annotated[float, "JSON null is NaN"]
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Any: "any value"} | {
    FloatOrNaN: "a number or null"
}
_PLURALS = {bool: "true or false", int: "integers", float: "numbers", str: "strings", Any: "values"} | {
    FloatOrNaN: "numbers or nulls"
}


@attrs.frozen
class Fault:
    """One fault inside a value, at a path relative to that value."""

    path: tuple[Part, ...]
    message: str
    hint: str = ""

    def under(self, part: Part) -> Fault:
        """The same fault, seen from the table or list that contains the value at `part`."""
        return attrs.evolve(self, path=(part, *self.path))


class Invalid(Exception):
    """Carries all faults of one value up to the table or list that contains it."""

    def __init__(self, faults: Collection[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(fault.message for fault in faults))


def is_sequence(annotation: Any) -> bool:
    """Whether a field of this type takes a list."""
    return (typing.get_origin(annotation) or annotation) in (tuple, list, Sequence)


def is_mapping(annotation: Any) -> bool:
    """Whether a field of this type takes a table with keys of the author's choice."""
    origin = typing.get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def is_union(annotation: Any) -> bool:
    """Whether a field takes several types."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def is_literal(annotation: Any) -> bool:
    """Whether a field takes one of some fixed values."""
    return typing.get_origin(annotation) is typing.Literal


def kind(annotation: Any) -> str:
    """Describes the values of a field of this type: "an integer", "a list of 2 numbers"."""
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if is_union(annotation):
        return " or ".join(kind(part) for part in parts)
    if is_literal(annotation):
        return "one of " + ", ".join(show(word) for word in parts)
    if is_sequence(annotation):
        fixed = typing.get_origin(annotation) is tuple and parts[-1] is not Ellipsis
        items = _PLURALS.get(parts[0], "tables") if parts else "values"
        return f"a list of {len(parts)} {items}" if fixed else f"a list of {items}"
    return _KINDS.get(annotation, "a table")


def show(value: Any) -> str:
    """Formats a value, shortened."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple, str, bool, int, float)):
        text = json.dumps(value, default=str)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return "nothing" if value is None else f"the {type(value).__name__} {value}"


def wrong(expected: str, value: Any, hint: str = "") -> Fault:
    """The fault of a value that differs from what its field takes."""
    return Fault((), f"must be {expected}, got {show(value)}", hint)


def unknown_key(key: str, names: list[str]) -> Fault:
    """The fault of a key that does not exist; suggests the near miss, or else lists all keys."""
    return Fault((key,), f"unknown key {key!r}", near_miss(key, names) or f"available: {', '.join(sorted(names))}")


def validator_message(error: Exception) -> str:
    """The message of a validator's error, alone."""
    # attrs' own validators put the attribute and the options into args, after the sentence.
    return str(error.args[0]) if error.args else type(error).__name__
