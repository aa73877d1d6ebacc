"""`reproduce`: a run made again from its lock, in folders of its own, and compared with what the run kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.errors import LockError, RecipeError
from speculators.events import Listen
from speculators.facts import VerifierFacts
from speculators.files.disk import cache_folder, disk_errors, read_json, write_json
from speculators.pipeline.run import run_recipe
from speculators.pipeline.run_lock import environment_here
from speculators.recipe.lock import Difference, Environment, Lock, differences
from speculators.recipe.lock_check import MissingFile, differing_inputs, relocate
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN, Finding
from speculators.reproduce.outputs import Sides, compare
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.sources import obtain, verifier_files

MARK = "reproduces.json"
RESULT = "reproduction.json"


@attrs.frozen(kw_only=True)
class Reproduction:
    """What a re-run showed.

    Attributes:
        run, to: the folders of the run and of the re-run.
        environment: what differs from the lock, before and here.
        tolerance: that values were held to; None where the bits had to be the same.
        findings: by stage.
    """

    run: Path
    to: Path
    environment: tuple[Difference, ...]
    tolerance: float | None
    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding | None:
        """The first difference: of the earliest stage, and within it of the earliest update."""
        differing = [found for found in self.findings if found.result == DIFFERS]
        if not differing:
            return None
        of_stage = [found for found in differing if found.stage == differing[0].stage]
        return min(of_stage, key=lambda found: -1 if found.check == "inputs" else _step(found))

    @property
    def unverified(self) -> list[str]:
        """What could not be compared, as "STAGE CHECK".

        Another platform's states cannot be told by their hash; what was trained from them stands for them.
        """
        trained = any(found.stage == "train" and found.result in (SAME, WITHIN) for found in self.findings)
        stood_for = {"capture"} if trained and self.tolerance is not None else set()
        unknown = (found for found in self.findings if found.result == UNKNOWN and found.stage not in stood_for)
        return [f"{found.stage} {found.check}" for found in unknown]

    @property
    def verdict(self) -> str:
        """In words; a run is reproduced only where nothing was left uncompared."""
        if self.first is not None:
            return "not reproduced"
        return "not fully verified" if self.unverified else "reproduced"

    @property
    def promise(self) -> str:
        """What was held against the run, in words."""
        if self.tolerance is None:
            return "the same bits: nothing that can matter differs from the lock"
        why = "something that can matter differs from the lock, or a server computed the states"
        return f"within {self.tolerance:g} (reproduce.tolerance): {why}"

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "run": str(self.run),
            "to": str(self.to),
            "verdict": self.verdict,
            "reproduced": self.verdict == "reproduced",
            "unverified": self.unverified,
            "promise": self.promise,
            "tolerance": self.tolerance,
            "environment": [each.to_json() for each in self.environment],
            "findings": [attrs.asdict(each) for each in self.findings],
            "first": None if self.first is None else attrs.asdict(self.first),
        }


def _step(found: Finding) -> float:
    return float("inf") if found.step is None else found.step


def reproduce(run: Path, lock: Lock, *, to: Path, until: str, world: World, listen: Listen) -> Reproduction:
    """Makes a run again and compares; every process calls this, rank 0 compares.

    Args:
        run: its folder.
        to: where the re-run is kept; one that was interrupted goes on.
        until: the last stage that is made and compared.
        listen: gets the events of the re-run.

    Raises:
        LockError: the lock's recipe cannot be used here, or `to` holds something else.
        SpeculatorsError: whatever a run can meet; what was made stays, and the next call goes on from it.
    """
    environment = _told(lock, environment_here(world))
    # It can be given, so that it need not cost the promise.
    torch.set_num_threads(lock.environment.threads)
    here = environment_here(world)
    locked = lock.resolved(run)
    # A server's states are other bits each time: they depend on what else it was asked at that moment.
    tolerance = locked.reproduce.tolerance if locked.data.served or _can_matter(lock, here) else None
    recipe, findings = world.broadcast(_inputs(run, lock, tolerance) if world.is_main else None)
    stages = list(lock.fingerprints)
    wanted = stages[: stages.index(until) + 1]
    findings = [found for found in findings if found.stage in wanted]
    result = Reproduction(run=run, to=to, environment=environment, tolerance=tolerance, findings=tuple(findings))
    if any(found.result == DIFFERS and found.check == "content" for found in findings):
        return result
    places = Places(runs=to / "runs", cache=to / "cache", verifiers=cache_folder())
    if world.is_main:
        _claim(to, run, lock, here)
    world.barrier()
    run_recipe(recipe, places=places, world=world, listen=listen, until=until)
    if not world.is_main:
        return result
    plan = make_plan(recipe, VerifierFacts(lock.verifier.config), world_size=world.size)
    sides = Sides(run=run, lock=lock, cache=cache_folder(), plan=plan, places=places, tolerance=tolerance)
    for stage in wanted:
        findings += compare(stage, sides)
    findings.sort(key=lambda found: wanted.index(found.stage))
    result = attrs.evolve(result, findings=tuple(findings))
    write_json(to / RESULT, result.to_json())
    return result


def _told(lock: Lock, here: Environment) -> tuple[Difference, ...]:
    """Returns what differs from the lock here, and what differed in those that the run was resumed in."""
    resumed = [
        attrs.evolve(each, key=f"resumed in: {each.key}")
        for other in lock.resumed_in
        for each in differences(lock.environment, other)
    ]
    return (*differences(lock.environment, here), *resumed)


def _can_matter(lock: Lock, here: Environment) -> bool:
    return any(each.matters for other in (*lock.resumed_in, here) for each in differences(lock.environment, other))


def _inputs(run: Path, lock: Lock, tolerance: float | None) -> tuple[Recipe, list[Finding]]:
    """Obtains the inputs; returns the recipe that finds them, and what they show. Findings "content" end it here."""
    recipe, lost = relocate(lock.resolved(run), lock, run)
    findings = [_lost(each) for each in lost]
    folder = obtain(recipe.verifier, cache=cache_folder())
    findings += _verifier(lock, verifier_files(folder), tolerance)
    if not lost:
        plan = _plan(recipe, lock, run)
        findings += [found for stage in lock.fingerprints for found in _stage_inputs(lock, plan, stage)]
    return recipe, findings


def _lost(each: MissingFile) -> Finding:
    return Finding(
        stage=each.stage,
        check="content",
        result=DIFFERS,
        evidence=str(each),
        what=each.key,
        recorded=each.locked,
        again=each.current,
    )


def _verifier(lock: Lock, files: dict[str, str], tolerance: float | None) -> Iterator[Finding]:
    locked = lock.verifier.files
    differ = [name for name in dict.fromkeys([*locked, *files]) if locked.get(name) != files.get(name)]
    if tolerance is not None:
        # Another version of a library writes the same tokenizer or config otherwise; the tokens tell whether it is.
        differ = [name for name in differ if name.endswith(".safetensors")]
    if not differ:
        yield Finding(stage="verifier", check="content", result=SAME, evidence=f"{len(files)} files by sha256")
    for name in differ:
        words = f"{name}: its sha256 is {files.get(name)}, that of the lock is {locked.get(name)}"
        yield Finding(
            stage="verifier",
            check="content",
            result=DIFFERS,
            evidence=words,
            what=name,
            recorded=locked.get(name),
            again=files.get(name),
        )


def _plan(recipe: Recipe, lock: Lock, run: Path) -> Plan:
    try:
        return make_plan(recipe, VerifierFacts(lock.verifier.config), world_size=lock.environment.world_size)
    except RecipeError as error:
        raise LockError(f"{run}: its recipe cannot be planned any more:\n{error}") from error


def _stage_inputs(lock: Lock, plan: Plan, stage: str) -> Iterator[Finding]:
    """Yields what this code makes of the lock's recipe, where that is not what the lock says."""
    told = differing_inputs(lock.inputs, plan.inputs(), stage)
    if stage == "train" and lock.seed != plan.recipe.seed and not any(path == "seed" for path, _, _ in told):
        told.append(("seed", lock.seed, plan.recipe.seed))
    for path, locked, here in told:
        words = f"{path} is {locked!r} in the lock, and {here!r} by its recipe"
        yield Finding(
            stage=stage, check="inputs", result=DIFFERS, evidence=words, what=path, recorded=locked, again=here
        )
    if not told and lock.fingerprints[stage] == plan.stage(stage).fingerprint:
        yield Finding(stage=stage, check="inputs", result=SAME, evidence=f"fingerprint {lock.fingerprints[stage][:8]}")


def _claim(to: Path, run: Path, lock: Lock, here: Environment) -> None:
    """Marks the folder as this re-run's; one of another lock or environment is not gone on with."""
    mark = {"fingerprints": lock.fingerprints, "recipe": lock.recipe, "environment": attrs.asdict(here)}
    held = read_json(to / MARK)
    hint = "give another folder (--to), or remove this one"
    if held is None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise LockError(f"{to}: is not empty, and holds no re-run", hint=hint)
    if held is not None and {key: held.get(key) for key in mark} != json.loads(json.dumps(mark)):
        raise LockError(f"{to}: holds the re-run of another lock, or one made in another environment", hint=hint)
    with disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
    write_json(to / MARK, {"run": str(run), **mark})
