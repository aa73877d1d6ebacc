"""The lock of a run hashes the sources of this package that compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.pipeline import run_lock
from speculators.pipeline.run_lock import COMPUTING, NOT_COMPUTING, code_here

ROOT = Path(__file__).parents[2]


def test_every_room_is_listed_as_computing_or_not() -> None:
    """Every module of the package is listed in run_lock.py, which says whether a lock hashes its sources."""
    rooms = {path.stem for path in (ROOT / "speculators").iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__pycache__"}
    assert rooms <= {*COMPUTING, *NOT_COMPUTING}
    assert set(COMPUTING).isdisjoint(NOT_COMPUTING)
    # In a wheel these three are also inside the package.
    assert rooms | {"cli", "recipes", "benchmarks"} >= {*COMPUTING, *NOT_COMPUTING} - {"api"}


@pytest.mark.parametrize(
    ("file", "changes"),
    [("nn/rotary.py", True), ("model.py", True), ("doctor/run.py", False), ("report/html.py", False)],
)
def test_only_code_that_computes_makes_a_run_irreproducible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, changes: bool
) -> None:
    """Correcting a sentence in a report does not change the lock's hash of the sources."""
    monkeypatch.setattr(run_lock, "_PACKAGE", tmp_path / "speculators")
    source = tmp_path / "speculators" / file
    source.parent.mkdir(parents=True)
    source.write_text("before\n")
    before = code_here().sources
    source.write_text("after\n")
    assert (code_here().sources != before) == changes
