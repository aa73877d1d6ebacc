"""Strict structuring of TOML and JSON values into attrs classes: no coercion, every problem reported, none twice.

cattrs finds the hook for an annotation. Its own hooks coerce (3.7 -> 3, "false" -> True, "abc" -> ("a", "b", "c")),
stop at the first validator, and drop the message of the validator. The hooks here do none of that.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import cattrs

from speculators.errors import Problem
from speculators.registry import near_miss
from speculators.structure.faults import (
    Fault,
    FloatOrNaN,
    Invalid,
    is_literal,
    is_mapping,
    is_sequence,
    is_union,
    kind,
    unknown_key,
    validator_message,
    wrong,
)
from speculators.structure.origin import Origin, Part, path_text

T = TypeVar("T")
Locate = Callable[[tuple[Part, ...]], Origin]


def structure(
    data: Any,
    cls: type[T],
    *,
    path: tuple[Part, ...] = (),
    file: str | None = None,
    locate: Locate | None = None,
    keys: Collection[str] | None = None,
) -> tuple[T | None, list[Problem]]:
    """Builds `cls` from plain values.

    Args:
        data: values parsed from TOML or JSON.
        path: the path of `data` in its file, which starts the path of each problem.
        file: the file, if lines are not known.
        locate: finds the file and line of a path.
        keys: the fields that `data` may set; None for all.

    Returns:
        The value and no problems, or None and all problems.
    """
    try:
        return build(cls, data, keys), []
    except Invalid as invalid:
        find = locate or (lambda path: Origin("recipe", file))
        return None, [to_problem(fault, path, find) for fault in invalid.faults]


def to_problem(fault: Fault, path: tuple[Part, ...], locate: Locate) -> Problem:
    """Turns a fault into a Problem with its place in the file."""
    whole = (*path, *fault.path)
    origin = locate(whole)
    return Problem(path_text(whole), fault.message, fault.hint, origin.file, origin.line)


def build(cls: type[T], data: Any, keys: Collection[str] | None = None, also: Sequence[str] = ()) -> T:
    """Builds `cls` from a table; raises Invalid with every fault in it.

    Args:
        keys: the fields that `data` may set; None for all.
        also: keys that other code reads; they only complete the suggestions for misspelt keys.
    """
    if not isinstance(data, Mapping):
        raise Invalid([wrong("a table", data)])
    fields = [f for f in attrs.fields(cls) if f.init and (keys is None or f.name in keys)]  # type: ignore[arg-type]
    names = [field.name for field in fields]
    # Derived fields (init=False) are written to JSON beside the others; they are computed again, not read.
    derived = {field.name for field in attrs.fields(cls) if not field.init}  # type: ignore[arg-type]
    faults = [unknown_key(key, [*names, *also]) for key in data if key not in names and key not in derived]
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for field in fields:
        if field.name in data:
            try:
                values[field.name] = CONVERTER.structure(data[field.name], hints[field.name])
            except Invalid as invalid:
                faults += [fault.under(field.name) for fault in invalid.faults]
        elif field.default is attrs.NOTHING:
            faults.append(Fault((field.name,), f"is missing; it must be {kind(hints[field.name])}"))
    faults += _validate(cls, fields, values)
    if faults:
        raise Invalid(faults)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise Invalid([Fault((), validator_message(error))]) from error


def _validate(cls: type, fields: Sequence[attrs.Attribute[Any]], values: Mapping[str, Any]) -> list[Fault]:
    """Runs the validators of all fields that have a value; the constructor would stop at the first failure."""
    # Validators may read other fields, so they see an instance with every value and default that exists by now.
    draft: Any = object.__new__(cls)
    for field in (each for each in attrs.fields(cls) if each.init):
        if field.name in values:
            object.__setattr__(draft, field.name, values[field.name])
        elif isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
            arguments = (draft,) if field.default.takes_self else ()
            object.__setattr__(draft, field.name, field.default.factory(*arguments))
        elif field.default is not attrs.NOTHING:
            object.__setattr__(draft, field.name, field.default)
    faults = []
    for field in fields:
        if field.name in values and field.validator is not None:
            try:
                field.validator(draft, field, values[field.name])
            except (ValueError, TypeError) as error:
                faults.append(Fault((field.name,), validator_message(error)))
    return faults


def _bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise Invalid([wrong(kind(bool), value, "without quotes" if value in ("true", "false") else "")])
    return value


def _int(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Invalid([wrong(kind(int), value)])
    return value


def _float(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Invalid([wrong(kind(float), value)])
    return float(value)


def _float_or_nan(value: Any, _: Any) -> float:
    return math.nan if value is None else _float(value, None)


def _str(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise Invalid([wrong(kind(str), value)])
    return value


def _sequence(value: Any, annotation: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise Invalid([wrong(kind(annotation), value)])
    origin = typing.get_origin(annotation) or annotation
    parts = typing.get_args(annotation) or (Any,)
    fixed = origin is tuple and parts[-1] is not Ellipsis and typing.get_args(annotation)
    if fixed and len(value) != len(parts):
        raise Invalid([wrong(kind(annotation), value)])
    items = _each(enumerate(value), parts if fixed else [parts[0]] * len(value))
    return items if origin is list else tuple(items)


def _mapping(value: Any, annotation: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Invalid([wrong("a table", value)])
    item = (typing.get_args(annotation) or (str, Any))[1]
    return dict(zip(value, _each(value.items(), [item] * len(value)), strict=True))


def _each(items: Any, annotations: Sequence[Any]) -> list[Any]:
    """Structures the items of a list or table; raises Invalid with the faults of all of them."""
    values, faults = [], []
    for (part, item), annotation in zip(items, annotations, strict=True):
        try:
            values.append(CONVERTER.structure(item, annotation))
        except Invalid as invalid:
            faults += [fault.under(part) for fault in invalid.faults]
    if faults:
        raise Invalid(faults)
    return values


def _union(value: Any, annotation: Any) -> Any:
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    optional = len(parts) < len(typing.get_args(annotation))
    # TOML has no null: "none" removes a default or an inherited value.
    if optional and value in (None, "none"):
        return None
    faults: list[Fault] = []
    for part in parts:
        try:
            return CONVERTER.structure(value, part)
        except Invalid as invalid:
            faults += invalid.faults
    raise Invalid(faults if len(parts) == 1 else [wrong(kind(annotation), value)])


def _literal(value: Any, annotation: Any) -> Any:
    for option in typing.get_args(annotation):
        if option == value and type(option) is type(value):
            return option
    names = [option for option in typing.get_args(annotation) if isinstance(option, str)]
    raise Invalid([wrong(kind(annotation), value, near_miss(value, names) if isinstance(value, str) else "")])


def _unreadable(_: Any, annotation: Any) -> Any:
    raise Invalid([Fault((), f"a field of type {annotation} cannot be written in a recipe")])


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(structure_fallback_factory=lambda annotation: _unreadable)
    converter.register_structure_hook_func(attrs.has, lambda value, cls: build(cls, value))
    converter.register_structure_hook_func(is_mapping, _mapping)
    converter.register_structure_hook_func(is_sequence, _sequence)
    converter.register_structure_hook_func(is_union, _union)
    converter.register_structure_hook_func(is_literal, _literal)
    converter.register_structure_hook_func(lambda annotation: annotation == FloatOrNaN, _float_or_nan)
    for scalar, hook in {bool: _bool, int: _int, float: _float, str: _str}.items():
        converter.register_structure_hook(scalar, hook)
    return converter


CONVERTER = _make_converter()
