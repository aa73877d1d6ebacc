"""The comparison of two recipes or runs as typed values, with the one-line wording that every report shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

REUSED, AGAIN = "reused", "runs again"
ABSENT = "not there"


@attrs.frozen(kw_only=True)
class ValueChange:
    """A value that differs.

    Attributes:
        path: TOML path.
        before, after: the values; ABSENT where a side has no such key. A path whose file changed is followed by the
            file's sha256.
        before_from, after_from: where each value was written.
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
class StageChange:
    """What becomes of one stage.

    Attributes:
        status: REUSED, AGAIN, or which side alone has the stage.
        because: the inputs that differ.
        cost: measured tokens and seconds of such a stage; None where no run recorded them.
    """

    stage: str
    status: str
    because: tuple[str, ...] = ()
    cost: str | None = None

    def __str__(self) -> str:
        because = f" ({', '.join(self.because)})" if self.because else ""
        cost = f", {self.cost}" if self.cost else ""
        return f"{self.stage} {self.status}{because}{cost}"

    def to_json(self) -> dict[str, Any]:
        """Omits `cost` where it is not known."""
        values = {"stage": self.stage, "status": self.status, "because": list(self.because)}
        return values if self.cost is None else {**values, "cost": self.cost}


@attrs.frozen(kw_only=True)
class AcceptanceChange:
    """The acceptance length of one setting that both runs measured on the same prompts.

    Attributes:
        before, after: tau.
        interval: 95% interval of the difference, paired by prompt; None where a run recorded no single prompts.
    """

    suite: str
    num_speculative_tokens: int
    temperature: float
    before: float
    after: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        setting = f"{self.suite}, K={self.num_speculative_tokens}, T={self.temperature:g}"
        low, high = self.interval or (None, None)
        interval = f" (95%, paired by prompt: {low:+.3f} to {high:+.3f})" if low is not None else ""
        return f"{setting}: tau {self.before:.3f} -> {self.after:.3f}, {self.after - self.before:+.3f}{interval}"


@attrs.frozen(kw_only=True)
class Curves:
    """What a run logged while it trained, in the order of its updates."""

    loss: tuple[float, ...]
    tau: tuple[float, ...]


@attrs.frozen(kw_only=True)
class RunDifferences:
    """What two runs recorded.

    Attributes:
        metrics: the settings that both measured.
        curves: of each run.
        environment: (before, after) by key of the lock: packages, device, threads, code.
    """

    metrics: tuple[AcceptanceChange, ...]
    curves: tuple[Curves, Curves]
    environment: Mapping[str, tuple[str, str]]


@attrs.frozen(kw_only=True)
class Comparison:
    """Two recipes or runs compared.

    Attributes:
        a, b: their names.
        changes: the values that differ by meaning, in the recipe's order.
        stages: empty where the verifier of a side is not known.
        comparable: whether acceptance lengths of both sides compare; None where that cannot be known.
        reasons: for `comparable`.
        notes: what was read from elsewhere than the user named, or not at all.
        runs: None unless both sides are runs.
    """

    a: str
    b: str
    changes: tuple[ValueChange, ...]
    stages: tuple[StageChange, ...]
    comparable: bool | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    runs: RunDifferences | None = None

    @property
    def headline(self) -> str:
        """Says whether results are comparable."""
        return {
            True: "results are comparable",
            False: "not comparable",
            None: "unknown whether results are comparable",
        }[self.comparable]

    @property
    def differs(self) -> bool:
        """Whether anything that is compared differs: values, stages, metrics, curves, environments."""
        if self.changes or any(stage.status != REUSED for stage in self.stages):
            return True
        runs = self.runs
        return runs is not None and (
            any(row.before != row.after for row in runs.metrics)
            or runs.curves[0] != runs.curves[1]
            or bool(runs.environment)
        )

    @property
    def without_changes(self) -> str:
        """Stands in for the table of changes where no value of the recipes differs."""
        return "the recipes are equivalent; the differences are below" if self.differs else "no difference in meaning"

    def to_json(self) -> dict[str, Any]:
        """The values that `spec diff --json` prints; its keys are documented and do not change."""
        values: dict[str, Any] = {
            "a": self.a,
            "b": self.b,
            "changes": [{**attrs.asdict(change), "section": change.section} for change in self.changes],
            "stages": [stage.to_json() for stage in self.stages],
            "comparable": self.comparable,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
        }
        if self.runs is not None:
            before, after = (attrs.asdict(curves) for curves in self.runs.curves)
            values["metrics"] = [attrs.asdict(row) for row in self.runs.metrics]
            values["curves"] = {"a": before, "b": after}
            values["environment"] = dict(self.runs.environment)
        return values


def value_text(value: Any) -> str:
    """Writes a value as people write it in TOML: `10_000`, `true`, `[1, 2]`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_text(item) for item in value)}]"
    return str(value)
