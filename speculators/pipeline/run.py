"""`run_recipe`: the whole main job, from a recipe to its acceptance table."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
from filelock import FileLock, Timeout

from speculators.bench.run import bench
from speculators.config import CONFIGS
from speculators.errors import ArtifactError
from speculators.events import Listen, StageEvent, WarningEvent
from speculators.facts import VerifierFacts
from speculators.files.whole import disk_errors, read_json, write_json, write_whole
from speculators.init_from import check_start
from speculators.model import SpeculatorModel
from speculators.nn.precision import place
from speculators.pipeline.build import training_kwargs
from speculators.pipeline.context import Context
from speculators.pipeline.inputs import conversations, state_source
from speculators.pipeline.locking import lock_of
from speculators.pipeline.plugins import is_plugin, named
from speculators.pipeline.precision import settled, told_of
from speculators.pipeline.rehearsal import rehearse
from speculators.pipeline.shared_folders import check_shared
from speculators.pipeline.training import lacking_hooks, serve_with, train_stage
from speculators.recipe import lock
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.runs.log import EventLog
from speculators.runs.places import Places
from speculators.runs.stages import SPECULATOR, TRAINED, bench_file, measured, trained
from speculators.tracking.sinks import OPEN, Subject, check_installed
from speculators.tracking.tracker import Tracker
from speculators.training.world import World
from speculators.verifier.sources import existing_folder, fetch_facts, obtain


@attrs.frozen(kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the run folder.
        bench: the benchmark as JSON values; None without suites.
        seconds: of this call.
        peak_memory_gb: of this process, in 1e9 bytes.
    """

    folder: Path
    bench: dict[str, Any] | None
    seconds: float
    peak_memory_gb: float


def run_recipe(recipe: Recipe, *, places: Places, world: World, listen: Listen, until: str | None = None) -> Outcome:
    """Runs every stage that is not done yet.

    Args:
        recipe: loaded.
        places: where things are kept.
        world: the launch; every process calls this.
        listen: gets the events, on rank 0.
        until: the last stage that is run; None for all.

    Raises:
        SpeculatorsError: something is the user's to mend; what was finished stays, and the next call goes on from it.
        KeyboardInterrupt: it was stopped; likewise.
    """
    began = time.monotonic()
    log = EventLog(listen)
    # A plug-in that is called as one of our algorithms is told, not taken for it.
    CONFIGS.names()
    tracker = _tracker(recipe, log, world)
    finished = False
    lone = ExitStack()
    try:
        with named(recipe.algorithm.name):
            check_shared(places, world)
            context = make_context(recipe, places, world, tracker)
            if is_plugin(recipe.algorithm.name):
                rehearse(context)
            if world.is_main:
                lone.enter_context(_working_in(context.run_folder))
            held = _begin(context, log, tracker)
            if until in ("verifier", "prepare", "capture"):
                _prepare_only(context, until)
            else:
                _train_stages(context, held)
            result = _bench_stage(context, tracker) if until in ("bench", None) else None
        finished = True
    finally:
        tracker.close(finished=finished)
        lone.close()
    return Outcome(
        folder=context.run_folder,
        bench=result,
        seconds=time.monotonic() - began,
        # Linux tells kilobytes, macOS bytes.
        peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if platform.system() == "Darwin" else 1024)
        / 1e9,
    )


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Keeps a run to one launch at a time; raises ArtifactError where another works on it: neither would be whole."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        hint = "wait until it ends, or give this one a folder of its own: --runs FOLDER"
        raise ArtifactError(f"{folder}: another launch is working on this run", hint=hint) from None
    try:
        yield
    finally:
        held.release()


def _tracker(recipe: Recipe, log: EventLog, world: World) -> Tracker:
    """Returns what gives the recipe's sinks their numbers, on rank 0; raises RecipeError where one is not installed."""
    if not world.is_main:
        return Tracker(then=log, sinks={})
    check_installed(recipe)
    return Tracker(then=log, sinks={name: OPEN[name] for name in recipe.tracking.sinks})


def _begin(context: Context, log: EventLog, tracker: Tracker) -> dict[str, Any] | None:
    """Opens the run folder and who is told of the run; returns the note of a training that is done."""
    world, folder, held = context.world, context.run_folder, None
    if world.is_main:
        held = trained(context.plan, context.places)
        _describe(context, idle=held is not None and _is_measured(context))
        log.open(folder / "events.jsonl")
        tracker.open(Subject(name=folder.name, folder=folder, values=flatten(context.recipe)))
    return world.broadcast(held)


def _train_stages(context: Context, held: Mapping[str, Any] | None) -> None:
    """Runs the stages up to the speculator, or tells that it is there."""
    if held is None:
        train_stage(context, conversations(context))
        return
    for stage in ("prepare", "capture")[: 2 if context.recipe.data.stored else 1]:
        context.skip(stage, "not needed: training is done")
    changed = serve_with(context, held) if context.world.is_main else ""
    done = f"update {held['step']} of {held['total_steps']}"
    context.skip("train", f"{context.run_folder / SPECULATOR} ({done}{changed})")


def make_context(recipe: Recipe, places: Places, world: World, listen: Listen) -> Context:
    """Obtains the verifier (stage `verifier`) and makes the plan; what the plan refuses is told before the download."""
    section = recipe.verifier
    if section.kind in ("hub", "folder"):
        make_plan(recipe, fetch_facts(section), world_size=world.size)
    began = time.monotonic()
    if world.is_main:
        held = existing_folder(section, cache=places.verifiers)
        if held is None:
            listen(StageEvent(stage="verifier", status="start", detail=section.model))
        folder = obtain(section, cache=places.verifiers, progress=listen)
        status, seconds = ("done" if held is None else "skip"), time.monotonic() - began
        listen(StageEvent(stage="verifier", status=status, detail=str(folder), seconds=seconds))
    world.barrier()
    if not world.is_main:
        folder = obtain(section, cache=places.verifiers)
    plan = settled(make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=world.size), world.device)
    if recipe.algorithm.config.init_from is not None:
        check_start(recipe.algorithm.name, plan.facts, training_kwargs(plan, None, None))
    if world.is_main and (words := told_of(plan, world.device)):
        listen(WarningEvent(message=words))
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def _prepare_only(context: Context, until: str) -> None:
    if until == "verifier":
        return
    prepared = conversations(context)
    if until == "capture":
        state_source(context, prepared)


def _is_measured(context: Context) -> bool:
    return not context.recipe.benchmark.suites or measured(context.plan, context.places) is not None


def _describe(context: Context, *, idle: bool) -> None:
    """Writes what was asked for, what it means here and what determines its result into the run folder."""
    folder, recipe = context.run_folder, context.recipe
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if recipe.file is not None:
        write_whole(folder / "recipe.toml", recipe.file.read_bytes())
    write_json(folder / "plan.json", context.plan.to_dict())
    write_json(folder / lock.NAME, lock_of(context, idle=idle).to_json())


def _bench_stage(context: Context, tracker: Tracker) -> dict[str, Any] | None:
    section, world = context.recipe.benchmark, context.world
    if not section.suites:
        context.skip("bench", "the recipe names no suite")
        return None
    if lacking := lacking_hooks(context):
        context.tell(WarningEvent(message=f"bench is left out: {lacking}"))
        return None
    if not world.is_main:
        world.barrier()
        return None
    file = bench_file(context.plan, context.places)
    if result := measured(context.plan, context.places):
        context.skip("bench", str(file))
    else:
        with context.stage("bench") as words:
            result = {"fingerprint": context.plan.stage("bench").fingerprint, **_measure(context)}
            with disk_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result)
            tracker.bench(result, step=read_json(context.run_folder / TRAINED)["step"])
            words.append(str(file))
    world.barrier()
    return result


def _measure(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    speculator = SpeculatorModel.from_pretrained(context.run_folder / SPECULATOR, verifier=context.folder)
    model = place(speculator, context.world.device)
    engine = context.engine(recipe.verifier.dtype)
    result = bench(
        model,
        engine,
        recipe.benchmark,
        name=context.run_folder.name,
        seed=recipe.seed,
        progress=context.tell,
        known=context.rows,
    )
    return result.to_json()
