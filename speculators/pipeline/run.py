"""`run_recipe`: the whole main job, from a recipe to its acceptance table."""

from __future__ import annotations

import platform
import resource
import time
from contextlib import ExitStack
from pathlib import Path

import attrs

from speculators.bench.result import BenchResult
from speculators.config import CONFIGS
from speculators.cpu import sharing_the_cpu
from speculators.events import Listen, RunEvent
from speculators.files.disk import disk_errors, write_json
from speculators.pipeline.bench import bench_stage
from speculators.pipeline.capture import state_source
from speculators.pipeline.context import Context, KeptRows
from speculators.pipeline.plugins import blaming_plugin, is_plugin, rehearse
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.run_lock import lock_of
from speculators.pipeline.setup import check_shared, make_context, try_verifier, working_in
from speculators.pipeline.train import set_served_tokens, train_stage
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.runs.log import EventLog
from speculators.runs.places import Places
from speculators.runs.recipes import keep_recipe
from speculators.runs.stages import TrainingRecord, measured, trained
from speculators.tracking.sinks import OPEN, TrackedRun, check_installed
from speculators.tracking.tracker import Tracker
from speculators.training.world import World, dismiss


@attrs.frozen(kw_only=True)
class RunOutcome:
    """The result of one call of `run_recipe`.

    Attributes:
        folder: the run folder.
        bench: None without suites.
        seconds: that this call took.
        peak_memory_gb: of this process, in 1e9 bytes.
    """

    folder: Path
    bench: BenchResult | None
    seconds: float
    peak_memory_gb: float


@sharing_the_cpu()
def run_recipe(
    recipe: Recipe,
    *,
    places: Places,
    world: World,
    listen: Listen,
    until: str | None = None,
    verify: bool = False,
    kept: KeptRows | None = None,
) -> RunOutcome:
    """Runs every stage that is not done yet.

    Args:
        recipe: loaded.
        places: where things are kept.
        world: the launch; every process calls this.
        listen: gets the events, on rank 0.
        until: the last stage to run; None for all.
        verify: hash all stored states before they are used, not each when it is first read.
        kept: the suite's responses that an earlier run of this process obtained, and where this one leaves its own.

    Raises:
        SpeculatorsError: the user has to mend something; finished work stays, and the next call goes on from it.
        KeyboardInterrupt: it was stopped; likewise.
    """
    began = time.monotonic()
    log = EventLog(listen)
    # Rejects a plug-in whose name collides with a built-in algorithm.
    CONFIGS.names()
    tracker = _tracker(recipe, log, world)
    finished, result = False, None
    lock = ExitStack()
    try:
        with blaming_plugin(recipe.algorithm.name):
            check_shared(places, world)
            context = make_context(recipe, places, world, tracker)
            context.verify = verify
            context.kept = {} if kept is None else kept
            if is_plugin(recipe.algorithm.name):
                rehearse(context)
            if world.is_main:
                lock.enter_context(working_in(context.run_folder))
            record = _begin(context, log, tracker)
            if record is None and recipe.measures_itself and until != "verifier":
                try_verifier(context)
            if until in ("verifier", "prepare", "capture"):
                _prepare_only(context, until)
            else:
                _train_stages(context, record)
            if until in ("bench", None):
                if not context.shares_verifier:
                    # Rank 0 alone measures; the others need not keep their devices until it is done.
                    context.world = dismiss(world)
                result = bench_stage(context, tracker)
        finished = True
    finally:
        tracker.close(finished=finished)
        lock.close()
    return RunOutcome(
        folder=context.run_folder.path,
        bench=result,
        seconds=time.monotonic() - began,
        peak_memory_gb=_peak_memory_gb(),
    )


def _peak_memory_gb() -> float:
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _tracker(recipe: Recipe, log: EventLog, world: World) -> Tracker:
    """Makes the listener that feeds the recipe's sinks, on rank 0; raises RecipeError where one is not installed."""
    if not world.is_main:
        return Tracker(then=log, sinks={})
    check_installed(recipe)
    return Tracker(then=log, sinks={name: OPEN[name] for name in recipe.tracking.sinks})


def _begin(context: Context, log: EventLog, tracker: Tracker) -> TrainingRecord | None:
    """Opens the run folder, its log and the sinks; returns the record of a training that is done."""
    record = None
    if context.world.is_main:
        run = context.run_folder
        record = trained(context.plan, context.places)
        is_measured = not context.recipe.benchmark.suites or measured(context.plan, context.places) is not None
        _describe(context, idle=record is not None and is_measured)
        log.open(run.events)
        tracker(RunEvent(folder=run.path))
        tracker.open(TrackedRun(name=run.name, folder=run.path, values=flatten(context.recipe)))
    return context.world.broadcast(record)


def _describe(context: Context, *, idle: bool) -> None:
    """Writes into the run folder the recipe, its plan here, and everything that determines its result."""
    run = context.run_folder
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    keep_recipe(run, context.plan)
    write_json(run.lock, lock_of(context, idle=idle).to_json())


def _prepare_only(context: Context, until: str) -> None:
    if until == "verifier":
        return
    prepared = prepared_conversations(context)
    if until == "capture":
        state_source(context, prepared)


def _train_stages(context: Context, record: TrainingRecord | None) -> None:
    """Runs the stages up to the speculator, or reports that it is there."""
    if record is None:
        train_stage(context, prepared_conversations(context))
        return
    for stage in ("prepare", "capture")[: 2 if context.recipe.data.stored else 1]:
        context.skip(stage, "not needed: training is done")
    changed = set_served_tokens(context, record) if context.world.is_main else ""
    done = f"update {record.step} of {record.total_steps}"
    context.skip("train", f"{context.run_folder.speculator} ({done}{changed})")
