"""The curves of a training, from its event log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from speculators.events import StepEvent
from speculators.runs.log import RunLog

# Points of a curve; a longer curve is drawn from the means of that many equal parts.
POINTS = 400
# The metric of a draft's accuracy at a depth, from 1, as `StepEvent.metrics` names it.
_ACCURACY = "accuracy_"
# (update, value).
Points = Sequence[tuple[float, float]]


@attrs.frozen(kw_only=True)
class TrainingCurves:
    """What a run logged at each update; every curve is empty where nothing was logged.

    Attributes:
        loss: mean over the supervised tokens.
        tau: exact acceptance length at each evaluation.
        learning_rate: of the update.
        grad_norm: before clipping.
        tokens_per_second: over all processes.
        accuracy: by depth, the share of rows whose drafts are right up to that depth.
    """

    loss: Points = ()
    tau: Points = ()
    learning_rate: Points = ()
    grad_norm: Points = ()
    tokens_per_second: Points = ()
    accuracy: Mapping[int, Points] = attrs.field(factory=dict)


def read_curves(log: RunLog) -> TrainingCurves:
    """Reads the curves from a log, each thinned to what a plot can show."""
    updates = log.updates()

    def curve(name: str) -> Points:
        return thinned([(update.step, getattr(update, name)) for update in updates], POINTS)

    return TrainingCurves(
        loss=curve("loss"),
        tau=thinned([(each.step, each.tau) for each in log.evaluations()], POINTS),
        learning_rate=curve("learning_rate"),
        grad_norm=curve("grad_norm"),
        tokens_per_second=curve("tokens_per_second"),
        accuracy=_accuracy(updates),
    )


def _accuracy(updates: Iterable[StepEvent]) -> dict[int, Points]:
    by_depth: dict[int, list[tuple[float, float]]] = {}
    for update in updates:
        for name, value in update.metrics.items():
            if name.startswith(_ACCURACY) and (depth := name.removeprefix(_ACCURACY)).isdecimal():
                by_depth.setdefault(int(depth), []).append((update.step, value))
    return {depth: thinned(by_depth[depth], POINTS) for depth in sorted(by_depth)}


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """Replaces a curve of more than `most` points by the means of `most` equal parts."""
    if len(points) <= most:
        return list(points)
    cuts = [round(index * len(points) / most) for index in range(most + 1)]
    parts = [points[cuts[index] : cuts[index + 1]] for index in range(most)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
