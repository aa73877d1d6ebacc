"""What two recipes or runs differ in by meaning, what that invalidates, and whether results compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs

from speculators.config import CONFIGS
from speculators.diff.consequence import consequence
from speculators.diff.side import Side
from speculators.recipe.lock_check import differing_inputs
from speculators.recipe.values import defaults

# What a recipe is called, what it is for, how it is held to its word and who is told: no part of what it does.
_NAMES = ("format", "name", "version", "summary", "hardware", "extends", "tracking", "reproduce", "expect")
ABSENT = "not there"
REUSED, AGAIN = "reused", "runs again"
# Inputs of a stage that are told one by one; of more the number is.
_TOLD = 4


@attrs.frozen(kw_only=True)
class Change:
    """A value that differs.

    Attributes:
        path: TOML path.
        before, after: the values; ABSENT where a side has no such key. Of a path that holds other content now, with
            the content's sha256.
        before_from, after_from: where they were written.
        consequence: one line, or "".
    """

    path: str
    before: Any
    after: Any
    before_from: str
    after_from: str
    consequence: str

    @property
    def section(self) -> str:
        """The first part of the path."""
        return self.path.partition(".")[0].partition("[")[0]


@attrs.frozen(kw_only=True)
class Verdict:
    """Whether results of both sides compare.

    Attributes:
        comparable: None where it cannot be known.
        reasons: what decides it.
    """

    comparable: bool | None
    reasons: tuple[str, ...]


def changes(a: Side, b: Side) -> list[Change]:
    """Returns the values that differ by meaning, in the recipe's order."""
    paths = [path for path in dict.fromkeys([*a.values, *b.values]) if path.partition(".")[0] not in _NAMES]
    found = []
    for path in paths:
        if _same(path, a, b):
            continue
        before, after = (side.values.get(path, ABSENT) for side in (a, b))
        found.append(
            Change(
                path=path,
                before=_with_content(path, a, b),
                after=_with_content(path, b, a),
                before_from=a.origins.get(path, ""),
                after_from=b.origins.get(path, ""),
                consequence=consequence(path, before, after, a.facts or b.facts, a.parameters or b.parameters),
            )
        )
    return found


def _same(path: str, a: Side, b: Side) -> bool:
    held = f"{path.removesuffix('.sha256')}.path" if path.startswith("data.") else "verifier.model"
    if path.endswith(".sha256") and held in a.contents and held in b.contents:
        return True  # the file's own content is compared, pinned or not
    if path in a.contents and path in b.contents:
        return a.contents[path] == b.contents[path]
    if path not in a.values or path not in b.values:
        one, other = (a, b) if path in a.values else (b, a)
        return _says_nothing(path, one, other)
    before, after = a.values[path], b.values[path]
    return before == after and type(before) is type(after)


def _says_nothing(path: str, one: Side, other: Side) -> bool:
    """Returns whether a value means the same as its absence: the other side's schema or algorithm had no such key."""
    if any(_below(key, path) for key in other.values):
        return True  # an empty table: what the other side has in it is told
    if any(_below(path, key) for key in other.values):
        return False  # the other side has "none" for the whole table
    name = one.values.get("algorithm.name")
    known = defaults(CONFIGS.get(name) if name in CONFIGS.names() else None)
    general = re.sub(r"\[\d+\]", "[]", path)
    return general in known and known[general] == one.values[path]


def _below(path: str, key: str) -> bool:
    return path.startswith((f"{key}.", f"{key}["))


def _with_content(path: str, side: Side, other: Side) -> Any:
    value = side.values.get(path, ABSENT)
    if path in side.contents and path in other.contents:
        return f"{text(value)} (sha256 {side.contents[path][:8]})"
    return value


def stages(a: Side, b: Side) -> list[dict[str, Any]]:
    """Returns each stage with what becomes of it: REUSED, AGAIN (and because of what), or which side alone has it."""
    if not a.stages or not b.stages:
        return []
    before, after = ({name: stage["inputs"] for name, stage in side.stages.items()} for side in (a, b))
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys([*a.stages, *b.stages]):
        because: list[str] = []
        if name not in a.stages or name not in b.stages:
            status = f"only in {a.name if name in a.stages else b.name}"
        elif a.stages[name]["fingerprint"] == b.stages[name]["fingerprint"]:
            status = REUSED
        else:
            status = AGAIN
            differing = differing_inputs(before, after, name)
            because = [f"{path} {_short(one)} -> {_short(other)}" for path, one, other in differing[:_TOLD]]
            because += [f"and {len(differing) - _TOLD} more"] if len(differing) > _TOLD else []
            anew = [row["stage"] for row in found if row["status"] != REUSED]
            because += [f"reads {stage}" for stage in anew if stage in after[name]]
        found.append({"stage": name, "status": status, "because": because})
    return found


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:8]
    told = text(value)
    return told if len(told) <= 40 else f"{told[:37]}..."


def verdict(a: Side, b: Side) -> Verdict:
    """Returns whether acceptance lengths of both sides may be compared, and why (not)."""
    if not a.stages or not b.stages:
        return Verdict(comparable=None, reasons=("the stages of one side are not known",))
    if "bench" not in a.stages or "bench" not in b.stages:
        lacking = " and ".join(side.name for side in (a, b) if "bench" not in side.stages)
        return Verdict(comparable=False, reasons=(f"{lacking} measures nothing",))
    reasons = []
    if a.stages["verifier"]["fingerprint"] != b.stages["verifier"]["fingerprint"]:
        reasons.append(f"the verifiers differ ({_named(a, 'verifier.model')} / {_named(b, 'verifier.model')})")
    one, other = (side.stages["bench"]["inputs"] for side in (a, b))
    if one["suites"] != other["suites"]:
        reasons.append(f"the suites differ ({_suites(a, one)} / {_suites(b, other)})")
    words = {
        "dtype": "the verifier's precision",
        "max_new_tokens": "the length of the responses",
        "temperature": "the temperatures",
        "num_speculative_tokens": "the K",
    }
    for key, word in words.items():
        both = set(_list(one[key])) & set(_list(other[key]))
        if not both:
            reasons.append(f"{word} differ ({one[key]} / {other[key]})")
    reasons += _measured_otherwise(a, b)
    if reasons:
        return Verdict(comparable=False, reasons=tuple(reasons))
    shared = [
        "the same verifier, suites and response length",
        *(
            f"at {name} {', '.join(f'{value:g}' for value in _list(one[key]) if value in _list(other[key]))}"
            for key, name in (("num_speculative_tokens", "K"), ("temperature", "T"))
        ),
    ]
    if a.measured.keys() & b.measured.keys():
        shared.append("by the same definition")
    told = [", ".join(shared)]
    if a.precision and b.precision and a.precision != b.precision:
        # How a draft was trained is what is compared; how it was measured is the same.
        told.append(f"but the drafts were trained in {a.precision} / {b.precision}: a part of a difference is rounding")
    return Verdict(comparable=True, reasons=tuple(told))


def _measured_otherwise(a: Side, b: Side) -> list[str]:
    """Returns what results of both runs were measured by otherwise, each told of the first setting that shows it."""
    words = {"definition": "the definitions of tau", "dtype": "the precisions in which the verifier computed"}
    found: dict[str, str] = {}
    for setting in (each for each in a.measured if each in b.measured):
        suite, k, temperature = setting
        for key, word in words.items():
            one, other = (side.measured[setting][key] for side in (a, b))
            if one != other:
                found.setdefault(key, f"{word} differ at {suite}, K={k}, T={temperature:g} ({one} / {other})")
    return list(found.values())


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _named(side: Side, path: str) -> str:
    return f"{side.values.get(path, '?')}@{side.stages['verifier']['fingerprint'][:8]}"


def _suites(side: Side, inputs: Mapping[str, Any]) -> str:
    names = [side.values.get(f"benchmark.suites[{index}].name", "?") for index in range(len(inputs["suites"]))]
    digests = [str(suite.get("sha256") or suite.get("revision") or "")[:4] for suite in inputs["suites"]]
    return ", ".join(f"{name}@{digest}" for name, digest in zip(names, digests, strict=True))


def as_values(a: Side, b: Side) -> dict[str, Any]:
    """Returns the whole comparison of the recipes as JSON values."""
    told = verdict(a, b)
    return {
        "a": a.name,
        "b": b.name,
        "changes": [{**attrs.asdict(change), "section": change.section} for change in changes(a, b)],
        "stages": stages(a, b),
        "comparable": told.comparable,
        "reasons": list(told.reasons),
        "notes": [*a.notes, *b.notes],
    }


def headline(comparable: bool | None) -> str:
    """Returns the verdict in words."""
    return {True: "results compare", False: "not comparable", None: "comparable is not known"}[comparable]


def unchanged(result: Mapping[str, Any]) -> str:
    """Returns what is said where no value of the recipes differs."""
    same = exit_code(result) == 0
    return "no difference in meaning" if same else "the recipes say the same; what differs is below"


def stage_line(stage: Mapping[str, Any]) -> str:
    """Returns what becomes of a stage in words."""
    because = f" ({', '.join(stage['because'])})" if stage["because"] else ""
    cost = f", {stage['cost']}" if stage.get("cost") else ""
    return f"{stage['stage']} {stage['status']}{because}{cost}"


def metric_line(row: Mapping[str, Any]) -> str:
    """Returns one difference of acceptance lengths in words."""
    place = f"{row['suite']}, K={row['num_speculative_tokens']}, T={row['temperature']:g}"
    low, high = row["interval"] or (None, None)
    between = f" (95%, paired by prompt: {low:+.3f} to {high:+.3f})" if low is not None else ""
    return f"{place}: tau {row['before']:.3f} -> {row['after']:.3f}, {row['after'] - row['before']:+.3f}{between}"


def text(value: Any) -> str:
    """Returns a value as TOML people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(text(item) for item in value)}]"
    return str(value)


def exit_code(result: Mapping[str, Any]) -> int:
    """Returns 0 where nothing that is compared differs, else 1: values, stages, metrics, curves, environments."""
    curves = result.get("curves", {"a": None, "b": None})
    differs = (
        result["changes"]
        or any(stage["status"] != REUSED for stage in result["stages"])
        or any(row["before"] != row["after"] for row in result.get("metrics", []))
        or curves["a"] != curves["b"]
        or result.get("environment")
    )
    return 1 if differs else 0
