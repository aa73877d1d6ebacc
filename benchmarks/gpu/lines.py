"""What a part of the check reports: lines with a verdict, each printed as soon as it is known. No torch here."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import attrs

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

# Figures, and what is wrong with them; "" if nothing is.
Judged = tuple[Mapping[str, Any], str]


@attrs.frozen(kw_only=True)
class VerdictLine:
    """One line of the table.

    Attributes:
        name: of the case.
        verdict: "passed", "failed" or "skipped".
        reason: why, unless it passed.
        figures: what was measured; a name says the unit.
    """

    name: str
    verdict: str = PASSED
    reason: str = ""
    figures: dict[str, Any] = attrs.field(factory=dict)


def judged(name: str, measure: Callable[[], Judged]) -> VerdictLine:
    """Runs one case; whatever it raises makes a failed line, so that the cases after it still run."""
    try:
        figures, fault = measure()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
        place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}"
        text = " ".join(str(error).split())[:300]
        return VerdictLine(name=name, verdict=FAILED, reason=f"{type(error).__name__}: {text} ({place})")
    return VerdictLine(name=name, verdict=FAILED if fault else PASSED, reason=fault, figures=dict(figures))
