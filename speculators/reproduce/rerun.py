"""Makes a run again from its lock, in folders of its own, and compares the outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch

from speculators.errors import LockError, RecipeError
from speculators.events import Listen
from speculators.facts import VerifierFacts
from speculators.files.disk import cache_folder, disk_errors, read_json, write_json
from speculators.pipeline.run import run_recipe
from speculators.pipeline.run_lock import environment_here
from speculators.recipe.lock import Difference, Environment, Lock, differences
from speculators.recipe.lock_check import differing_inputs
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.relocate import MissingFile, relocate
from speculators.recipe.schema import Recipe
from speculators.reproduce.findings import DIFFERS, SAME, Finding
from speculators.reproduce.outputs import RunPair, compare
from speculators.reproduce.result import Reproduction
from speculators.runs.places import RERUN, Places
from speculators.training.world import World
from speculators.verifier.sources import obtain, verifier_files

RESULT = "reproduction.json"


def reproduce(run: Path, lock: Lock, *, to: Path, until: str, world: World, listen: Listen) -> Reproduction:
    """Repeats a run and compares; every process calls this, rank 0 compares.

    Args:
        run: the run folder.
        to: where the re-run is kept; an interrupted one is continued.
        until: the last stage that is made and compared.
        listen: gets the events of the re-run.

    Raises:
        LockError: the lock's recipe cannot be used here, or `to` holds something else.
        SpeculatorsError: as for any run; finished work stays, and the next call continues from it.
    """
    environment = _environment_differences(lock, environment_here(world))
    # The number of threads can be set to the lock's, so that a difference need not cost the promise of equal bits.
    torch.set_num_threads(lock.environment.threads)
    current = environment_here(world)
    recipe = lock.resolved(run)
    # A server's states have other bits each time: they depend on the requests that it batched together.
    tolerance = recipe.reproduce.tolerance if recipe.data.served or _can_matter(lock, current) else None
    recipe, findings = world.broadcast(_check_inputs(run, lock, tolerance) if world.is_main else None)
    stages = list(lock.fingerprints)
    stages = stages[: stages.index(until) + 1]
    findings = [finding for finding in findings if finding.stage in stages]
    result = Reproduction(run=run, to=to, environment=environment, tolerance=tolerance, findings=tuple(findings))
    if any(finding.result == DIFFERS and finding.check == "content" for finding in findings):
        return result
    places = Places(runs=to / "runs", cache=to / "cache", verifiers=cache_folder())
    if world.is_main:
        _claim(to, run, lock, current)
    world.barrier()
    run_recipe(recipe, places=places, world=world, listen=listen, until=until)
    if not world.is_main:
        return result
    plan = make_plan(recipe, VerifierFacts(lock.verifier.config), world_size=world.size)
    pair = RunPair(run=run, lock=lock, cache=cache_folder(), plan=plan, places=places, tolerance=tolerance)
    for stage in stages:
        findings += compare(stage, pair)
    findings.sort(key=lambda finding: stages.index(finding.stage))
    result = attrs.evolve(result, findings=tuple(findings))
    write_json(to / RESULT, result.to_json())
    return result


def _environment_differences(lock: Lock, current: Environment) -> tuple[Difference, ...]:
    """Compares this environment, and those in which the run was resumed, with the lock's."""
    resumed = [
        attrs.evolve(each, key=f"resumed in: {each.key}")
        for other in lock.resumed_in
        for each in differences(lock.environment, other)
    ]
    return (*differences(lock.environment, current), *resumed)


def _can_matter(lock: Lock, current: Environment) -> bool:
    return any(each.matters for other in (*lock.resumed_in, current) for each in differences(lock.environment, other))


def _check_inputs(run: Path, lock: Lock, tolerance: float | None) -> tuple[Recipe, list[Finding]]:
    """Obtains the inputs and compares them with the lock.

    Returns:
        The recipe with each file where it is now, and the findings; one with check "content" ends the re-run.
    """
    recipe, missing = relocate(lock.resolved(run), lock, run)
    findings = [_missing(file) for file in missing]
    folder = obtain(recipe.verifier, cache=cache_folder())
    findings += _verifier(lock, verifier_files(folder), tolerance)
    if not missing:
        plan = _plan(recipe, lock, run)
        findings += [finding for stage in lock.fingerprints for finding in _stage_inputs(lock, plan, stage)]
    return recipe, findings


def _missing(file: MissingFile) -> Finding:
    return Finding(
        stage=file.stage,
        check="content",
        result=DIFFERS,
        evidence=str(file),
        what=file.key,
        recorded=file.recorded,
        again=file.again,
    )


def _verifier(lock: Lock, files: dict[str, str], tolerance: float | None) -> Iterator[Finding]:
    locked = lock.verifier.files
    differ = [name for name in dict.fromkeys([*locked, *files]) if locked.get(name) != files.get(name)]
    if tolerance is not None:
        # Another version of a library writes the same tokenizer or config in other bytes. If it is not the same, the
        # tokens of the stage `prepare` show it.
        differ = [name for name in differ if name.endswith(".safetensors")]
    if not differ:
        yield Finding(stage="verifier", check="content", result=SAME, evidence=f"{len(files)} files by sha256")
    for name in differ:
        yield Finding(
            stage="verifier",
            check="content",
            result=DIFFERS,
            evidence=f"{name}: its sha256 is {files.get(name)}, the lock's is {locked.get(name)}",
            what=name,
            recorded=locked.get(name),
            again=files.get(name),
        )


def _plan(recipe: Recipe, lock: Lock, run: Path) -> Plan:
    try:
        return make_plan(recipe, VerifierFacts(lock.verifier.config), world_size=lock.environment.world_size)
    except RecipeError as error:
        raise LockError(f"{run}: its recipe can no longer be planned:\n{error}") from error


def _stage_inputs(lock: Lock, plan: Plan, stage: str) -> Iterator[Finding]:
    """Compares the inputs that this code derives from the lock's recipe with those in the lock."""
    differing = differing_inputs(lock.inputs, plan.inputs(), stage)
    if stage == "train" and lock.seed != plan.recipe.seed and not any(path == "seed" for path, _, _ in differing):
        differing.append(("seed", lock.seed, plan.recipe.seed))
    for path, locked, derived in differing:
        yield Finding(
            stage=stage,
            check="inputs",
            result=DIFFERS,
            evidence=f"{path} is {locked!r} in the lock, and {derived!r} by its recipe",
            what=path,
            recorded=locked,
            again=derived,
        )
    if not differing and lock.fingerprints[stage] == plan.stage(stage).fingerprint:
        yield Finding(stage=stage, check="inputs", result=SAME, evidence=f"fingerprint {lock.fingerprints[stage][:8]}")


def _claim(to: Path, run: Path, lock: Lock, current: Environment) -> None:
    """Marks the folder as this re-run's; refuses a folder with the re-run of another lock or environment."""
    mark = {"fingerprints": lock.fingerprints, "recipe": lock.recipe, "environment": attrs.asdict(current)}
    earlier = read_json(to / RERUN)
    hint = "give another folder (--to), or remove this one"
    if earlier is None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise LockError(f"{to}: is not empty, and holds no re-run", hint=hint)
    # Through JSON and back, for what was read has lists where `mark` has tuples.
    if earlier is not None and {key: earlier.get(key) for key in mark} != json.loads(json.dumps(mark)):
        raise LockError(f"{to}: holds the re-run of another lock, or one made in another environment", hint=hint)
    with disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
    write_json(to / RERUN, {"run": str(run), **mark})
