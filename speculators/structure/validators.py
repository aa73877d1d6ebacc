"""attrs validators of recipe fields; their errors give the allowed values and the actual one."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from typing import Any

import attrs

from speculators.registry import near_miss

# Drafters to measure beside a speculator: look-ups, which read tokens; a look-up with the speculator where it has no
# match; and a smaller model. The last two are named with what follows a colon.
LOOK_UPS = ("ngram", "suffix")
HYBRID = "hybrid"
WITH_MODEL = "draft_model"

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def one_of(*allowed: str) -> Validator:
    """Makes a validator that accepts these words only."""

    def check(_: object, __: attrs.Attribute[Any], value: str) -> None:
        if value not in allowed:
            names = ", ".join(f'"{name}"' for name in allowed)
            hint = near_miss(value, list(allowed))
            raise ValueError(f'must be one of {names}, got "{value}"{f"; {hint}" if hint else ""}')

    return check


def between(low: float, high: float) -> Validator:
    """Makes a validator for low <= value <= high."""

    def check(_: object, __: attrs.Attribute[Any], value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"must be from {low:g} to {high:g}, got {value!r}")

    return check


def seed(_: object, __: attrs.Attribute[Any], value: int) -> None:
    """attrs validator: a seed that every generator of random numbers accepts."""
    if not 0 <= value < 2**63:
        raise ValueError(f"must be from 0 to 2^63 - 1 = {2**63 - 1}, got {value}")


def not_negative(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    """attrs validator: None, or a number >= 0."""
    if value is not None and value < 0:
        raise ValueError(f"must be >= 0, got {value!r}")


def share(_: object, __: attrs.Attribute[Any], value: float) -> None:
    """attrs validator: 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"must be at least 0 and below 1, got {value!r}")


def share_above_zero(_: object, __: attrs.Attribute[Any], value: float | None) -> None:
    """attrs validator: None, or 0 < value <= 1."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f'must be above 0 and at most 1, or "none", got {value!r}')


def band(_: object, __: attrs.Attribute[Any], value: tuple[float, float]) -> None:
    """attrs validator: [low, high] of an acceptance length, 1 <= low <= high."""
    if not 1 <= value[0] <= value[1]:
        raise ValueError(f"must be [low, high] with 1 <= low <= high, got {list(value)}")


def matches(pattern: str, what: str) -> Validator:
    """Makes a validator for None or a string that matches `pattern` as a whole; `what` describes it in errors."""

    def check(_: object, __: attrs.Attribute[Any], value: str | None) -> None:
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f'must be {what}, got "{value}"')

    return check


def server_url(_: object, __: attrs.Attribute[Any], value: str) -> None:
    """attrs validator: an http or https URL with a host, optionally a port and a path, and nothing else."""
    try:
        parts = urllib.parse.urlsplit(value)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # unbalanced brackets, a port that is not a number, an impossible host name
        host, port = b"", None
    if not host or port == 0 or not re.fullmatch(r"(?i:https?)://[^\s?#]+", value):
        raise ValueError(f'must be "http://HOST:PORT", got "{value}"')


def each(check: Validator) -> Validator:
    """Makes a validator for a non-empty list of distinct values that all pass `check`."""

    def check_all(_: object, __: attrs.Attribute[Any], values: tuple[Any, ...]) -> None:
        if not values or len(set(values)) != len(values):
            raise ValueError(f"must have one or more distinct values, got {list(values)}")
        for value in values:
            check(_, __, value)

    return check_all


def not_empty(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    """attrs validator: a list or a string that is not empty."""
    if not value:
        raise ValueError("must not be empty")


def cadence(_: object, __: attrs.Attribute[Any], value: int | str) -> None:
    """attrs validator: a number of steps > 0, or a share of the run such as "10%"."""
    if isinstance(value, str):
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
        good = share is not None and 0 < float(share.group(1)) <= 100
    else:
        good = value > 0
    if not good:
        raise ValueError(f'must be a number of steps > 0 or a share of the run such as "10%", got {value!r}')


def known_baselines(_: object, __: attrs.Attribute[Any], names: tuple[str, ...]) -> None:
    """attrs validator: names of baselines. The source of a model is checked when it is loaded."""
    hybrids = [f"{HYBRID}:{look_up}" for look_up in LOOK_UPS]
    for name in names:
        kind, _, source = name.partition(":")
        if name in (*LOOK_UPS, *hybrids) or (kind == WITH_MODEL and source):
            continue
        if kind in LOOK_UPS:
            hint = f"{kind} takes nothing after a colon"
        elif kind == HYBRID:
            hint = f"it needs a look-up: {' or '.join(hybrids)}"
        elif kind == WITH_MODEL:
            hint = f"it needs a model: {WITH_MODEL}:./folder, {WITH_MODEL}:owner/name, any form of verifier.model"
        else:
            hint = near_miss(kind, [*LOOK_UPS, HYBRID, WITH_MODEL])
        forms = ", ".join((*LOOK_UPS, *hybrids, f"{WITH_MODEL}:SOURCE"))
        raise ValueError(f"no baseline {name!r}; available: {forms}{f'; {hint}' if hint else ''}")
