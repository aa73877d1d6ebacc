"""The result of a re-run: its findings, what was compared how strictly, and whether the run counts as reproduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from speculators.recipe.lock import Difference
from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN, Finding


@attrs.frozen(kw_only=True)
class Reproduction:
    """The findings of a re-run and their verdict.

    Attributes:
        run, to: the folders of the run and of the re-run.
        environment: how the environments that made the run, and this one, differ from the lock.
        tolerance: how far values may be off; None where the bits had to be the same.
        findings: in the order of the stages.
    """

    run: Path
    to: Path
    environment: tuple[Difference, ...]
    tolerance: float | None
    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding | None:
        """The first difference: of the earliest stage, and within it of the earliest update."""
        differing = [finding for finding in self.findings if finding.result == DIFFERS]
        if not differing:
            return None
        of_stage = [finding for finding in differing if finding.stage == differing[0].stage]
        return min(of_stage, key=_order)

    @property
    def unverified(self) -> list[str]:
        """What could not be compared, as "STAGE CHECK".

        The states of another platform cannot be compared by their hash; what was trained from them stands for them.
        """
        trained = any(finding.stage == "train" and finding.result in (SAME, WITHIN) for finding in self.findings)
        vouched_for = {"capture"} if trained and self.tolerance is not None else set()
        unknown = (each for each in self.findings if each.result == UNKNOWN and each.stage not in vouched_for)
        return [f"{finding.stage} {finding.check}" for finding in unknown]

    @property
    def verdict(self) -> str:
        """Names the outcome; a run is "reproduced" only if everything was compared."""
        if self.first is not None:
            return "not reproduced"
        return "not fully verified" if self.unverified else "reproduced"

    @property
    def promise(self) -> str:
        """How strictly the re-run was compared, and why."""
        if self.tolerance is None:
            return "the same bits: nothing that can matter differs from the lock"
        why = "something that can matter differs from the lock, or a server computed the states"
        return f"within {self.tolerance:g} (reproduce.tolerance): {why}"

    def to_json(self) -> dict[str, Any]:
        """The values of reproduction.json and of `spec reproduce --json`."""
        return {
            "run": str(self.run),
            "to": str(self.to),
            "verdict": self.verdict,
            "reproduced": self.verdict == "reproduced",
            "unverified": self.unverified,
            "promise": self.promise,
            "tolerance": self.tolerance,
            "environment": [difference.to_json() for difference in self.environment],
            "findings": [attrs.asdict(finding) for finding in self.findings],
            "first": None if self.first is None else attrs.asdict(self.first),
        }


def _order(finding: Finding) -> float:
    # Inputs come before any update; what happens after the updates comes last.
    if finding.check == "inputs":
        return -1
    return float("inf") if finding.step is None else finding.step
