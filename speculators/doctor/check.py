"""What the doctor finds, as frozen values: the terminal, the JSON and the tests read the same."""

from __future__ import annotations

from typing import Any

import attrs

OK, WARNING, WRONG, SKIPPED = "ok", "warning", "wrong", "not checked"
FAMILIES = ("loads", "config", "alignment", "parity", "length", "data")


@attrs.frozen(kw_only=True)
class Check:
    """One check.

    Attributes:
        family: one of FAMILIES.
        name: of the check in its family.
        result: "ok", "warning" (it works, and costs something or will not work elsewhere), "wrong" or "not checked".
        evidence: what was found, with figures; why it was not checked.
        todo: what to do about it; "" where nothing needs to be done.
    """

    family: str
    name: str
    result: str
    evidence: str
    todo: str = ""


@attrs.frozen(kw_only=True)
class Diagnosis:
    """All checks of one speculator.

    Attributes:
        speculator: its folder.
        algorithm: as config.json names it, "" where that cannot be read.
        verifier: its folder.
        prompts: the answers that acceptance was measured on, in words.
        false_alarm: probability that chance alone makes any check of a sound speculator wrong.
        seconds: it took.
    """

    speculator: str
    algorithm: str
    verifier: str
    prompts: str
    false_alarm: float
    seconds: float
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.result != WRONG for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {**attrs.asdict(self), "healthy": self.healthy}


@attrs.frozen
class Family:
    """Makes the checks of one family."""

    name: str

    def ok(self, name: str, evidence: str) -> Check:
        """Returns a check that was passed."""
        return Check(family=self.name, name=name, result=OK, evidence=evidence)

    def warning(self, name: str, evidence: str, todo: str = "") -> Check:
        """Returns a check with something to know."""
        return Check(family=self.name, name=name, result=WARNING, evidence=evidence, todo=todo)

    def wrong(self, name: str, evidence: str, todo: str) -> Check:
        """Returns a check that failed."""
        return Check(family=self.name, name=name, result=WRONG, evidence=evidence, todo=todo)

    def skipped(self, name: str, why: str) -> Check:
        """Returns a check that could not be made."""
        return Check(family=self.name, name=name, result=SKIPPED, evidence=why)


def listed(names: list[str], most: int = 4) -> str:
    """Returns a few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
