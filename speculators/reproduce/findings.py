"""What one check of a re-run shows, and when two values count as the same."""

from __future__ import annotations

import math
from typing import Any

import attrs

SAME, WITHIN, DIFFERS, UNKNOWN = "same", "within tolerance", "differs", "not known"


@attrs.frozen(kw_only=True)
class Finding:
    """What one check of one stage showed.

    Attributes:
        result: SAME (the bits), WITHIN (the recipe's tolerance), DIFFERS, or UNKNOWN (the run did not keep it).
        evidence: a sentence that supports the result.
        step: the optimizer update of the first difference.
        what: the value, file or tensor that differs first.
        recorded, again: its value in the run and in the re-run.
        by: the absolute difference, where both are numbers.
    """

    stage: str
    check: str
    result: str
    evidence: str
    step: int | None = None
    what: str = ""
    recorded: Any = None
    again: Any = None
    by: float | None = None


@attrs.frozen(kw_only=True)
class Gap:
    """A value that differs.

    Attributes:
        what: its name.
        recorded, again: the value in the run and in the re-run.
        by: the absolute difference; None where it is not a number.
        within: the tolerance allows it.
    """

    what: str
    recorded: Any
    again: Any
    by: float | None = None
    within: bool = False

    def __str__(self) -> str:
        by = "" if self.by is None else f", by {self.by:.3g}"
        return f"{self.what} is {_text(self.recorded)} in the run and {_text(self.again)} now{by}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back to the same bits
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def gap(what: str, recorded: Any, again: Any, tolerance: float | None) -> Gap | None:
    """Compares two values; None where they are the same.

    Args:
        tolerance: relative to the larger value, or to 1 if both are smaller; None where only equal values will do.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (recorded, again))
    if not numbers:
        same = type(recorded) is type(again) and recorded == again
        return None if same else Gap(what=what, recorded=recorded, again=again)
    # A metric over nothing (a position never reached) is nan, and counts as the same as another nan.
    if recorded == again or (math.isnan(recorded) and math.isnan(again)):
        return None
    by = abs(recorded - again)
    within = tolerance is not None and by <= tolerance * max(1.0, abs(recorded), abs(again))
    return Gap(what=what, recorded=recorded, again=again, by=by, within=within)


def worst(gaps: list[Gap]) -> str:
    """Summarises gaps as SAME, WITHIN or DIFFERS."""
    if not gaps:
        return SAME
    return WITHIN if all(each.within for each in gaps) else DIFFERS


def first(gaps: list[Gap]) -> Gap:
    """Picks the gap to report: the first that no tolerance allows, else the first."""
    return next((each for each in gaps if not each.within), gaps[0])


def finding(stage: str, check: str, gaps: list[Gap], *, same: str, step: int | None = None) -> Finding:
    """Turns the gaps of one check into a finding.

    Args:
        same: the evidence if there are no gaps.
        step: the update of the gaps.
    """
    if not gaps:
        return Finding(stage=stage, check=check, result=SAME, evidence=same)
    reported = first(gaps)
    more = f"; {len(gaps)} values differ" if len(gaps) > 1 else ""
    return Finding(
        stage=stage,
        check=check,
        result=worst(gaps),
        evidence=f"{reported}{more}",
        step=step,
        what=reported.what,
        recorded=reported.recorded,
        again=reported.again,
        by=reported.by,
    )


def unknown(stage: str, check: str, why: str) -> Finding:
    """A finding for what cannot be compared, with the reason."""
    return Finding(stage=stage, check=check, result=UNKNOWN, evidence=why)
