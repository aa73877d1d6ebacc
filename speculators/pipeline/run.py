"""`run_recipe`: the whole main job, from a recipe to its acceptance table."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import BenchResult
from speculators.config import CONFIGS
from speculators.events import Listen
from speculators.files.disk import disk_errors, write_json, write_whole
from speculators.pipeline.bench import bench_stage
from speculators.pipeline.capture import state_source
from speculators.pipeline.context import Context
from speculators.pipeline.plugins import blaming_plugin, is_plugin, rehearse
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.run_lock import lock_of
from speculators.pipeline.setup import check_shared, make_context, working_in
from speculators.pipeline.train import serve_with, train_stage
from speculators.recipe import lock
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.runs.log import EventLog
from speculators.runs.places import Places
from speculators.runs.stages import SPECULATOR, measured, trained
from speculators.tracking.sinks import OPEN, Subject, check_installed
from speculators.tracking.tracker import Tracker
from speculators.training.world import World


@attrs.frozen(kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: the run folder.
        bench: None without suites.
        seconds: of this call.
        peak_memory_gb: of this process, in 1e9 bytes.
    """

    folder: Path
    bench: BenchResult | None
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
        with blaming_plugin(recipe.algorithm.name):
            check_shared(places, world)
            context = make_context(recipe, places, world, tracker)
            if is_plugin(recipe.algorithm.name):
                rehearse(context)
            if world.is_main:
                lone.enter_context(working_in(context.run_folder))
            held = _begin(context, log, tracker)
            if until in ("verifier", "prepare", "capture"):
                _prepare_only(context, until)
            else:
                _train_stages(context, held)
            result = bench_stage(context, tracker) if until in ("bench", None) else None
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
        train_stage(context, prepared_conversations(context))
        return
    for stage in ("prepare", "capture")[: 2 if context.recipe.data.stored else 1]:
        context.skip(stage, "not needed: training is done")
    changed = serve_with(context, held) if context.world.is_main else ""
    done = f"update {held['step']} of {held['total_steps']}"
    context.skip("train", f"{context.run_folder / SPECULATOR} ({done}{changed})")


def _prepare_only(context: Context, until: str) -> None:
    if until == "verifier":
        return
    prepared = prepared_conversations(context)
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
