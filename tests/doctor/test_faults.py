"""A stranger's checkpoint with a fault is never called healthy, and the fault is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from clinic import Clinic
from faults import FAULTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_strangers_checkpoint_is_named(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """Without a run, only files, figures and acceptance can show it; the check in the list names it."""
    symptom = FAULTS[name]
    speculator = clinic.alone(tmp_path)
    symptom.tamper(speculator)
    examined = clinic.examine(speculator)
    check = examined[symptom.check]
    assert check.result in ("wrong", symptom.result), check
    assert re.search(symptom.phrase, check.evidence), check.evidence
    assert check.todo
    if symptom.result == "wrong":
        assert examined.diagnosis.verdict == "not healthy"


def test_the_sound_checkpoint_is_healthy(clinic: Clinic, tmp_path: Path) -> None:
    """The same folder without a fault has neither errors nor warnings."""
    examined = clinic.examine(clinic.alone(tmp_path))
    assert examined.with_result("wrong", "warning") == []
    assert examined.diagnosis.verdict == "healthy"
