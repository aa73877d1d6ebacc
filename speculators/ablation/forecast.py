"""What an ablation would do: runs that are done, stages that runs share, and the time that is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import attrs

from speculators.ablation.arms import Contest
from speculators.ablation.runs import ArmRun
from speculators.recipe.load import load_recipe
from speculators.runs.places import Places
from speculators.runs.records import records
from speculators.runs.stages import on_disk

# What several runs may share; training and benchmark are a run's own.
SHARED = ("prepare", "capture")
OWN = ("train", "bench")
# What an estimate rests on once each arm, or another one, has been trained.
MEASURED = "as the runs that are done took"


@attrs.frozen(kw_only=True)
class RunForecast:
    """One run.

    Attributes:
        run: name of its folder.
        stages: whether the output of each stage is on disk.
        seconds: of training and benchmark, as far as they are left to do; None where that cannot be estimated.
        command: makes this run alone.
    """

    arm: str
    seed: int
    run: str
    stages: dict[str, bool]
    seconds: float | None
    command: str

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do; the cache, which training reads, may be gone by then."""
        return all(self.stages[stage] for stage in OWN)


@attrs.frozen(kw_only=True)
class SharedStage:
    """The output of a stage that is made once.

    Attributes:
        arms: that read it, and are not done.
        is_done: whether it is on disk.
    """

    stage: str
    fingerprint: str
    arms: tuple[str, ...]
    is_done: bool


@attrs.frozen(kw_only=True)
class Forecast:
    """An ablation before it runs.

    Attributes:
        seconds: of training and benchmarks that are left, or of whole runs as the recipe says; None if unknown.
        basis: what the estimate rests on.
    """

    name: str
    setting: str
    runs: tuple[RunForecast, ...]
    shared: tuple[SharedStage, ...]
    seconds: float | None
    basis: str

    @property
    def left(self) -> int:
        """Number of runs that are not done."""
        return sum(not run.is_done for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values."""
        return attrs.asdict(self)


def forecast(runs: Sequence[ArmRun], contest: Contest, places: Places) -> Forecast:
    """Looks up what is done, and estimates the time that is left from the runs that are, or from the recipe."""
    times = _times(runs, places)
    forecasts = []
    for run in runs:
        stages = on_disk(run.plan, places)
        parts = [times.get((run.arm, stage), times.get(("", stage))) for stage in OWN if not stages[stage]]
        known = [seconds for seconds in parts if seconds is not None]
        forecasts.append(
            RunForecast(
                arm=run.arm,
                seed=run.seed,
                run=places.run(run.plan).name,
                stages=stages,
                seconds=sum(known) if len(known) == len(parts) else None,
                command=run.command(contest.ablation.recipe, contest.ablation.path.parent, places),
            )
        )
    shared = tuple(_shared(runs, forecasts))
    seconds, basis = _total(forecasts, contest)
    if basis == MEASURED and not all(stage.is_done for stage in shared):
        basis += "; without preparing and capturing"
    return Forecast(
        name=contest.ablation.name,
        setting=contest.setting,
        runs=tuple(forecasts),
        shared=shared,
        seconds=seconds,
        basis=basis,
    )


def _times(runs: Sequence[ArmRun], places: Places) -> Mapping[tuple[str, str], float]:
    """Averages what runs of this ablation took: by arm and stage, and under "" over the arms."""
    known = {record.run: record for record in records(places.runs)}
    measured: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        record, prints = known.get(places.run(run.plan).name), run.plan.fingerprints()
        for stage in OWN:
            if record and stage in record.seconds and record.fingerprints.get(stage) == prints[stage]:
                measured.setdefault((run.arm, stage), []).append(record.seconds[stage])
    times = {key: mean(seconds) for key, seconds in measured.items()}
    for stage in OWN:
        if by_arm := [seconds for (_, measured_stage), seconds in times.items() if measured_stage == stage]:
            times["", stage] = mean(by_arm)
    return times


def _shared(runs: Sequence[ArmRun], forecasts: Sequence[RunForecast]) -> Iterator[SharedStage]:
    """Collects the arms that are not done by the output that they read."""
    pending = [(run, each) for run, each in zip(runs, forecasts, strict=True) if not each.is_done]
    for stage in SHARED:
        readers: dict[str, dict[str, bool]] = {}
        for run, each in pending:
            if stage in each.stages:
                readers.setdefault(run.plan.stage(stage).fingerprint, {})[run.arm] = each.stages[stage]
        for fingerprint, arms in readers.items():
            yield SharedStage(stage=stage, fingerprint=fingerprint, arms=tuple(arms), is_done=next(iter(arms.values())))


def _total(runs: Sequence[RunForecast], contest: Contest) -> tuple[float | None, str]:
    """Adds up the seconds that are left, with what the sum rests on."""
    left = [run for run in runs if not run.is_done]
    known = [run.seconds for run in left if run.seconds is not None]
    if not left:
        return 0.0, "every run is done"
    if len(known) == len(left):
        return sum(known), MEASURED
    # Options drop what was measured with the recipe as it is, so it is read without them.
    recipe = load_recipe(contest.ablation.recipe)
    if recipe.minutes is None:
        return None, "the first runs will show how long the others take"
    return len(left) * recipe.minutes * 60, f"{len(left)} times the recipe's usual time of {recipe.usual_time}"
