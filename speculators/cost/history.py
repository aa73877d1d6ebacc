"""Times of stages on this machine, from the measurements of earlier runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from speculators.cost.costs import Costs
from speculators.cost.sizes import costs_of
from speculators.errors import SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.files.disk import read_json
from speculators.recipe.plan import Plan, make_plan
from speculators.runs.places import Places
from speculators.runs.recipes import load_run
from speculators.runs.records import RunRecord, records
from speculators.training.world import local_device
from speculators.verifier.sources import existing_folder


@attrs.frozen(kw_only=True)
class StageTime:
    """The time that a stage will take.

    Attributes:
        how: "measured" for the same work, "by the speed of" other work, or "at peak x share".
        run: the run that was measured; None for times from a data sheet.
    """

    seconds: float
    how: str
    run: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Turns the time into JSON values."""
        return attrs.asdict(self, filter=lambda _, value: value is not None)


def measured_times(costs: Costs, places: Places) -> dict[str, StageTime]:
    """Estimates the time of each stage on this machine, as far as earlier runs allow.

    A stage with the same fingerprint takes as long as before. Capture and training of other sizes make their products
    at the speed that the newest run of the same precision reached.
    """
    known = records(places.runs, local_device().type)
    times: dict[str, StageTime] = {}
    for stage in costs.plan.stages:
        for record in known:
            if record.fingerprints.get(stage.name) == stage.fingerprint and stage.name in record.seconds:
                times[stage.name] = StageTime(seconds=record.seconds[stage.name], how="measured", run=record.run)
                break
    work = {stage: flops for stage, flops in costs.flops().items() if flops is not None and stage not in times}
    return {**times, **_by_speed(costs, places, known, work)}


def _by_speed(
    costs: Costs, places: Places, known: Sequence[RunRecord], work: Mapping[str, float]
) -> dict[str, StageTime]:
    for record in known:
        stages = work.keys() & record.tokens_per_second.keys()
        other = _costs_of_run(record, costs.plan, places) if stages else None
        if other is None or _precision(other.plan) != _precision(costs.plan):
            continue
        per_token = {"capture": other.verifier.flops(other.mean_tokens), "train": _train_flops_per_token(other)}
        return {
            stage: StageTime(
                seconds=work[stage] / (record.tokens_per_second[stage] * per_token[stage]),
                how="by the speed of",
                run=record.run,
            )
            for stage in sorted(stages)
            if per_token[stage]
        }
    return {}


def _train_flops_per_token(costs: Costs) -> float:
    """Counts the operations per trained token, updates of the optimizer included; 0 if they are unknown."""
    whole = costs.flops()["train"]
    return whole / costs.amount.trained if whole and costs.amount.trained else 0.0


def _precision(plan: Plan) -> tuple[str, str]:
    return plan.precision, plan.recipe.data.capture_dtype


def _costs_of_run(record: RunRecord, plan: Plan, places: Places) -> Costs | None:
    """Counts the products of an earlier run; None if its recipe, verifier or algorithm are no longer available.

    The run's recipe counts only if it still gives the run's own fingerprint. A plug-in that the plan does not use is
    never imported: it is somebody's program, and has nothing to do with the plan.
    """
    written = read_json(record.folder.plan)
    try:
        module = written["recipe"]["algorithm"].get("module")
    except (AttributeError, KeyError, TypeError):
        return None
    if module not in (None, plan.recipe.algorithm.module):
        return None
    try:
        recipe = load_run(record.folder)
        folder = existing_folder(recipe.verifier, cache=places.verifiers)
        same = recipe.verifier == plan.recipe.verifier
        facts = plan.facts if same else VerifierFacts.read(folder / "config.json") if folder else None
        if facts is None:
            return None
        other = make_plan(recipe, facts)
        if "precision" in written:  # the precision that the run computed in; older runs did not record it
            other = attrs.evolve(other, precision=written["precision"])
        own = other.stage("train").fingerprint == record.fingerprints.get("train")
        return costs_of(other, places, kind=local_device().type) if own else None
    except SpeculatorsError:
        return None
