"""When a re-run counts as a reproduction."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN, Finding
from speculators.reproduce.result import Reproduction

STATES = Finding(stage="capture", check="files", result=UNKNOWN, evidence="the sha256 differs")


def trained(result: str) -> Finding:
    return Finding(stage="train", check="updates", result=result, evidence="")


@pytest.mark.parametrize(
    ("tolerance", "result", "verdict"),
    [
        (0.01, WITHIN, "reproduced"),
        (0.01, UNKNOWN, "not fully verified"),
        (0.01, DIFFERS, "not reproduced"),
        (None, SAME, "not fully verified"),
    ],
)
def test_another_platforms_states_are_vouched_for_by_the_training_on_them(tolerance, result, verdict):
    """Only if bits are not promised, and only if the training was compared."""
    findings = (STATES, trained(result))
    reproduction = Reproduction(run=Path(), to=Path(), environment=(), tolerance=tolerance, findings=findings)
    assert reproduction.verdict == verdict
