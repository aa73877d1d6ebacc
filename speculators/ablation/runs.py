"""The runs of an ablation: an ordinary run for each arm and seed, planned together, then run one after another."""

from __future__ import annotations

import gc
import shlex
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from speculators.ablation.arms import Contest, in_variant
from speculators.bench.result import BenchResult, Setting
from speculators.errors import ArtifactError, Problem, RecipeError, SpeculatorsError
from speculators.events import Listen
from speculators.facts import VerifierFacts
from speculators.pipeline.context import KeptRows
from speculators.pipeline.run import run_recipe
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.shipped import shipped_facts
from speculators.runs.log import RunLog
from speculators.runs.places import Places, RunFolder
from speculators.runs.stages import measured, trained
from speculators.training.world import World
from speculators.verifier.sources import config_facts, existing_folder
from speculators.verifier.supported import architecture_problems


@attrs.frozen(kw_only=True)
class ArmRun:
    """The run of one arm with one seed.

    Attributes:
        options: what `spec run` would get as `--set`.
    """

    arm: str
    seed: int
    plan: Plan
    options: tuple[str, ...]

    def command(self, recipe: str, folder: Path, places: Places) -> str:
        """The command line that makes the same run; relative paths in the options start at `folder`."""
        options = (part for option in self.options for part in ("--set", option))
        line = shlex.join(["spec", "run", recipe, "--runs", str(places.runs.absolute()), *options])
        same = folder.resolve() == Path.cwd()
        return line if same else f"cd {shlex.quote(str(folder.resolve()))} && {line}"


@attrs.frozen(kw_only=True)
class MeasuredRun:
    """A run that is done.

    Attributes:
        setting: the one that decides.
        training_minutes: None where the log does not say.
    """

    folder: RunFolder
    setting: Setting
    training_minutes: float | None

    @property
    def agrees(self) -> bool:
        """Whether the live decode, if there was one, confirmed the number."""
        return self.setting.live is None or self.setting.live.agreement.agrees


@attrs.frozen(kw_only=True)
class FailedRun:
    """A run that ended with an error."""

    message: str


@attrs.frozen(kw_only=True)
class RunBegins:
    """Announces the next run: the `number`th of the `total` that were not done before."""

    run: ArmRun
    number: int
    total: int


@attrs.frozen(kw_only=True)
class RunEnds:
    """Reports the outcome of a run; `was_done` if an earlier call made it."""

    run: ArmRun
    outcome: MeasuredRun | FailedRun
    was_done: bool


def plan_runs(contest: Contest) -> tuple[ArmRun, ...]:
    """Plans every run, seed by seed; the first seed's runs make a first table.

    Raises:
        RecipeError: carries the problems of all arms, among them a variant that trains what another arm trains.
    """
    facts = _facts(contest.arms[0].recipe.verifier)
    runs, problems = [], []
    trains: dict[str, str] = {}
    for seed in contest.seeds:
        for arm in contest.arms:
            recipe = arm.recipes[seed]
            is_first = seed == contest.seeds[0]
            try:
                plan = make_plan(recipe, facts)
            except RecipeError as error:
                problems += [_of_arm(contest, arm.name, problem) for problem in error.problems if is_first]
                continue
            if is_first:
                unsupported = architecture_problems(recipe, facts)
                problems += [_of_arm(contest, arm.name, problem) for problem in unsupported]
                same = trains.setdefault(plan.stage("train").fingerprint, arm.name)
                if same != arm.name:
                    message = f"trains exactly what {same!r} trains"
                    hint = "change a value that training reads: spec show RECIPE --why KEY says which stages read it"
                    problems.append(in_variant(contest.ablation, arm.name, message, hint))
            own_seed = recipe.origins.get("seed")
            is_set = own_seed is not None and own_seed.kind == "--set"
            options = (*contest.ablation.options(arm.name), *((f"seed={seed}",) if is_set else ()))
            runs.append(ArmRun(arm=arm.name, seed=seed, plan=plan, options=options))
    if problems:
        raise RecipeError(problems)
    return tuple(runs)


def finished(run: ArmRun, contest: Contest, places: Places) -> MeasuredRun | None:
    """Reads a run that is trained and measured, whoever made it; None if anything is left to do."""
    if trained(run.plan, places) is None or (result := measured(run.plan, places)) is None:
        return None
    return _measured(result, places.run(run.plan), contest)


def run_all(
    runs: Sequence[ArmRun], contest: Contest, *, places: Places, world: World, listen: Listen
) -> Iterator[RunBegins | RunEnds]:
    """Makes the runs that are not done, one after another in this process; one that fails does not stop the others.

    Args:
        listen: gets the events of each run.

    Raises:
        KeyboardInterrupt: it was stopped; the next call goes on with the run that was at work.
    """
    done = {index: before for index, run in enumerate(runs) if (before := finished(run, contest, places))}
    number, kept = 0, KeptRows()
    for index, run in enumerate(runs):
        if index in done:
            yield RunEnds(run=run, outcome=done[index], was_done=True)
            continue
        number += 1
        yield RunBegins(run=run, number=number, total=len(runs) - len(done))
        yield RunEnds(run=run, outcome=_attempt(run, contest, places, world, listen, kept), was_done=False)


def _attempt(
    run: ArmRun, contest: Contest, places: Places, world: World, listen: Listen, kept: KeptRows
) -> MeasuredRun | FailedRun:
    try:
        outcome = run_recipe(run.plan.recipe, places=places, world=world, listen=listen, kept=kept)
        if outcome.bench is None:
            raise ArtifactError(f"{outcome.folder}: it was not measured", hint="its algorithm lacks a hook")
        return _measured(outcome.bench, RunFolder(outcome.folder), contest)
    except SpeculatorsError as error:
        return FailedRun(message="; ".join(map(str, error.problems)))
    # The others of a night's runs must not be lost to an error of one, whatever it is: memory, a plug-in, a bug.
    except Exception as error:
        traceback.print_exc()
        return FailedRun(message=f"{type(error).__name__}: {error}")
    finally:
        gc.collect()


def _measured(result: BenchResult, folder: RunFolder, contest: Contest) -> MeasuredRun:
    key = (contest.suite.name, contest.k, contest.temperature)
    setting = next(each for each in result.settings if each.key == key)
    return MeasuredRun(folder=folder, setting=setting, training_minutes=_training_minutes(folder))


def _training_minutes(folder: RunFolder) -> float | None:
    try:
        seconds = RunLog.read(folder.events).stage_seconds().get("train")
    except ArtifactError:  # a damaged log costs the time alone
        return None
    return None if seconds is None else seconds / 60


def _facts(section: VerifierSection) -> VerifierFacts:
    """Reads the verifier's config.json without fetching the verifier, where that is possible."""
    if folder := existing_folder(section):
        return VerifierFacts.read(folder / "config.json")
    return shipped_facts(section) or config_facts(section)


def _of_arm(contest: Contest, arm: str, problem: Problem) -> Problem:
    message = ": ".join(filter(None, (problem.path, problem.message)))
    return in_variant(contest.ablation, arm, message, problem.hint)
