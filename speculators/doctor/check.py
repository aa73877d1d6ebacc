"""The doctor's findings as frozen values, which the terminal, the JSON output and the tests share."""

from __future__ import annotations

from typing import Any

import attrs

OK, WARNING, WRONG, SKIPPED = "ok", "warning", "wrong", "not checked"
# The check that decides whether a speculator that nothing is wrong with is healthy.
ACCEPTANCE = ("alignment", "acceptance")
WEAK = "weak: nothing is wrong, but drafting without training does as well"
UNDECIDED = "undecided: nothing is wrong, but acceptance could not be measured"
SUSPECTED = "undecided: nothing is certainly wrong, but a fault is likely"
FAMILIES = ("loads", "config", "alignment", "parity", "length", "data")


@attrs.frozen(kw_only=True)
class Check:
    """The outcome of one check.

    Attributes:
        family: one of FAMILIES.
        name: unique within the family.
        result: "ok"; "warning", if it works but costs something or will fail elsewhere; "wrong"; or "not checked".
        evidence: the finding with figures, or the reason for not checking.
        todo: the remedy; "" if none is needed.
    """

    family: str
    name: str
    result: str
    evidence: str
    todo: str = ""


@attrs.frozen(kw_only=True)
class Diagnosis:
    """The results of all checks of one speculator.

    Attributes:
        speculator: path of its folder.
        algorithm: the name in config.json; "" if the file cannot be read.
        verifier: path of its folder.
        prompts: describes the answers on which acceptance was measured.
        false_alarm: probability that any check of a sound speculator fails by chance.
        seconds: duration of the examination.
    """

    speculator: str
    algorithm: str
    verifier: str
    prompts: str
    false_alarm: float
    seconds: float
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether a check is wrong."""
        return any(check.result == WRONG for check in self.checks)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong or suspected, and the draft accepts more than what needs no training."""
        return not self.failed and not self._suspected and self._acceptance == OK

    @property
    def verdict(self) -> str:
        """The diagnosis in one phrase; only a draft that drafts is called healthy."""
        if self.failed:
            return "not healthy"
        if self.healthy:
            return "healthy"
        if self._suspected:
            return SUSPECTED
        return WEAK if self._acceptance == WARNING else UNDECIDED

    @property
    def _suspected(self) -> bool:
        """Whether another alignment is likely, though not certain."""
        family, acceptance = ACCEPTANCE
        return any(
            check.family == family and check.name != acceptance and check.result == WARNING for check in self.checks
        )

    @property
    def _acceptance(self) -> str:
        named = [check.result for check in self.checks if (check.family, check.name) == ACCEPTANCE]
        return named[0] if named else SKIPPED

    def to_json(self) -> dict[str, Any]:
        """Converts the diagnosis to JSON values, with the verdict."""
        return {**attrs.asdict(self), "healthy": self.healthy, "verdict": self.verdict}


@attrs.frozen
class Family:
    """Builds the checks of one family."""

    name: str

    def ok(self, name: str, evidence: str) -> Check:
        """Reports a check that passed."""
        return Check(family=self.name, name=name, result=OK, evidence=evidence)

    def warning(self, name: str, evidence: str, todo: str = "") -> Check:
        """Reports a check that passed with a cost or a risk."""
        return Check(family=self.name, name=name, result=WARNING, evidence=evidence, todo=todo)

    def wrong(self, name: str, evidence: str, todo: str) -> Check:
        """Reports a check that failed."""
        return Check(family=self.name, name=name, result=WRONG, evidence=evidence, todo=todo)

    def skipped(self, name: str, why: str) -> Check:
        """Reports a check that could not run."""
        return Check(family=self.name, name=name, result=SKIPPED, evidence=why)


def listed(names: list[str], most: int = 4) -> str:
    """Lists at most `most` names and counts the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
