"""Compares two recipes by meaning: values that differ, stages that run again, whether results are comparable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from speculators.config import CONFIGS
from speculators.diff.comparability import comparability
from speculators.diff.comparison import ABSENT, AGAIN, REUSED, Comparison, StageChange, ValueChange, value_text
from speculators.diff.consequence import consequence
from speculators.diff.side import DiffSide
from speculators.recipe.lock_check import differing_inputs
from speculators.recipe.values import defaults

# Sections that change nothing a recipe does: its name and purpose, what it is expected to reach, who is notified.
_WITHOUT_EFFECT: tuple[str, ...] = ("format", "name", "version", "summary", "hardware", "minutes", "extends")
_WITHOUT_EFFECT += ("tracking", "reproduce", "expect")
# List at most this many changed inputs of a stage; summarise the rest.
_INPUTS_LISTED = 4


def compare(a: DiffSide, b: DiffSide) -> Comparison:
    """Compares what both recipes say and what their stages read."""
    comparable, reasons = comparability(a, b)
    return Comparison(
        a=a.name,
        b=b.name,
        changes=tuple(value_changes(a, b)),
        stages=tuple(stage_changes(a, b)),
        comparable=comparable,
        reasons=reasons,
        notes=(*a.notes, *b.notes),
    )


def value_changes(a: DiffSide, b: DiffSide) -> list[ValueChange]:
    """Lists the values that differ by meaning, in the recipe's order."""
    paths = [path for path in dict.fromkeys([*a.values, *b.values]) if path.partition(".")[0] not in _WITHOUT_EFFECT]
    changes = []
    for path in paths:
        if _same(path, a, b):
            continue
        before, after = (side.values.get(path, ABSENT) for side in (a, b))
        changes.append(
            ValueChange(
                path=path,
                before=_with_content(path, a, b),
                after=_with_content(path, b, a),
                before_from=a.origins.get(path, ""),
                after_from=b.origins.get(path, ""),
                consequence=consequence(path, before, after, a.facts or b.facts, a.parameters or b.parameters),
            )
        )
    return changes


def _same(path: str, a: DiffSide, b: DiffSide) -> bool:
    file_path = f"{path.removesuffix('.sha256')}.path" if path.startswith("data.") else "verifier.model"
    if path.endswith(".sha256") and file_path in a.contents and file_path in b.contents:
        return True  # the file's own content is compared, pinned or not
    if path in a.contents and path in b.contents:
        return a.contents[path] == b.contents[path]
    if path not in a.values or path not in b.values:
        one, other = (a, b) if path in a.values else (b, a)
        return _means_absence(path, one, other)
    before, after = a.values[path], b.values[path]
    # 1 == True and 1 == 1.0, but a recipe means different things by them.
    return before == after and type(before) is type(after)


def _means_absence(path: str, one: DiffSide, other: DiffSide) -> bool:
    """Whether a value of `one` means the same as its absence: the other's schema or algorithm had no such key."""
    if any(_below(key, path) for key in other.values):
        return True  # an empty table: what the other side has in it is listed by itself
    if any(_below(path, key) for key in other.values):
        return False  # the other side has "none" for the whole table
    name = one.values.get("algorithm.name")
    known = defaults(CONFIGS.get(name) if name in CONFIGS.names() else None)
    general = re.sub(r"\[\d+\]", "[]", path)
    return general in known and known[general] == one.values[path]


def _below(path: str, key: str) -> bool:
    return path.startswith((f"{key}.", f"{key}["))


def _with_content(path: str, side: DiffSide, other: DiffSide) -> Any:
    value = side.values.get(path, ABSENT)
    if path in side.contents and path in other.contents:
        return f"{value_text(value)} ({_content(side.contents[path], other.contents[path])})"
    return value


def _content(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Names the files of one side that differ from the other's, with the start of their hashes."""
    if "" in mine:
        return f"sha256 {mine[''][:8]}"
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    listed = [f"{name} {mine[name][:8] if name in mine else 'absent'}" for name in differing[:_INPUTS_LISTED]]
    if len(differing) > _INPUTS_LISTED:
        listed.append(f"{len(differing) - _INPUTS_LISTED} more")
    return ", ".join(listed)


def stage_changes(a: DiffSide, b: DiffSide) -> list[StageChange]:
    """Says for each stage whether it is reused, runs again (and because of what), or is of one side alone."""
    if not a.stages or not b.stages:
        return []
    before, after = ({name: stage.inputs for name, stage in side.stages.items()} for side in (a, b))
    changes: list[StageChange] = []
    for name in dict.fromkeys([*a.stages, *b.stages]):
        if name not in a.stages or name not in b.stages:
            changes.append(StageChange(stage=name, status=f"only in {a.name if name in a.stages else b.name}"))
        elif a.stages[name].fingerprint == b.stages[name].fingerprint:
            changes.append(StageChange(stage=name, status=REUSED))
        else:
            differing = differing_inputs(before, after, name)
            because = [f"{path} {_short(one)} -> {_short(other)}" for path, one, other in differing[:_INPUTS_LISTED]]
            if len(differing) > _INPUTS_LISTED:
                because.append(f"and {len(differing) - _INPUTS_LISTED} more")
            # A stage that reads another's output names it among its inputs.
            because += [f"reads {row.stage}" for row in changes if row.status != REUSED and row.stage in after[name]]
            changes.append(StageChange(stage=name, status=AGAIN, because=tuple(because)))
    return changes


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:8]
    text = value_text(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
