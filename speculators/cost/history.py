"""Times of stages on this machine, from what earlier runs measured."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from speculators.cost.costs import Costs
from speculators.cost.sizes import costs_of
from speculators.errors import SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.files.disk import read_json
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.runs.places import Places
from speculators.runs.records import RunRecord, records
from speculators.training.world import local_device
from speculators.verifier.sources import existing_folder


@attrs.frozen(kw_only=True)
class Measured:
    """A time that rests on a run.

    Attributes:
        how: "measured" for the same work, or by the speed of other work.
        run: which one.
    """

    seconds: float
    how: str
    run: str


def measured(costs: Costs, places: Places) -> dict[str, Measured]:
    """Returns the time of each stage on this machine, as far as runs tell.

    A stage of the same fingerprint takes what it took. Capture and training of other sizes make their products at the
    speed that the newest run of the same precision reached.
    """
    known = records(places.runs, local_device().type)
    told: dict[str, Measured] = {}
    for stage in costs.plan.stages:
        for record in known:
            if record.fingerprints.get(stage.name) == stage.fingerprint and stage.name in record.seconds:
                told[stage.name] = Measured(seconds=record.seconds[stage.name], how="measured", run=record.run)
                break
    work = {stage: flops for stage, flops in costs.flops().items() if flops is not None and stage not in told}
    return {**told, **_by_speed(costs, places, known, work)}


def _by_speed(costs: Costs, places: Places, known: list[RunRecord], work: Mapping[str, float]) -> dict[str, Measured]:
    for record in known:
        stages = work.keys() & record.tokens_per_second.keys()
        other = _costs_of_run(record, costs.plan, places) if stages else None
        if other is None or _precision(other.plan) != _precision(costs.plan):
            continue
        a_token = {"capture": other.verifier.flops(other.mean_tokens), "train": _train_flops_a_token(other)}
        return {
            stage: Measured(
                seconds=work[stage] / (record.tokens_per_second[stage] * a_token[stage]),
                how="by the speed of",
                run=record.run,
            )
            for stage in sorted(stages)
            if a_token[stage]
        }
    return {}


def _train_flops_a_token(costs: Costs) -> float:
    """Returns the operations a token that is trained on, updates of the optimizer included."""
    whole = costs.flops()["train"]
    return whole / costs.amount.trained if whole and costs.amount.trained else 0.0


def _precision(plan: Plan) -> tuple[str, str]:
    return plan.precision, plan.recipe.data.states_dtype


def _costs_of_run(record: RunRecord, plan: Plan, places: Places) -> Costs | None:
    """Returns what a run cost in products; None where its recipe, verifier or algorithm are not at hand any more.

    `--set` is not in the recipe that a run keeps: only one that still gives the run's own fingerprint is taken. Nor
    is a plug-in imported that the plan does not have: it is somebody's program, and has nothing to do with the plan.
    """
    held = read_json(record.folder.plan)
    try:
        module = held["recipe"]["algorithm"].get("module")
    except (AttributeError, KeyError, TypeError):
        return None
    if module not in (None, plan.recipe.algorithm.module):
        return None
    try:
        recipe = load_recipe(str(record.folder.recipe))
        folder = existing_folder(recipe.verifier, cache=places.verifiers)
        same = recipe.verifier == plan.recipe.verifier
        facts = plan.facts if same else VerifierFacts.read(folder / "config.json") if folder else None
        if facts is None:
            return None
        found = make_plan(recipe, facts)
        if "precision" in held:  # what it computed in there; older runs do not tell
            found = attrs.evolve(found, precision=held["precision"])
        own = found.stage("train").fingerprint == record.fingerprints.get("train")
        return costs_of(found, places) if own else None
    except SpeculatorsError:
        return None
