"""`run_recipe`: the whole main job, from a recipe to its acceptance table."""

from __future__ import annotations

import platform
import resource
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.run import bench
from speculators.config import VerifierFacts
from speculators.data.files import write_json
from speculators.events import StageEvent, WarningEvent
from speculators.model import SpeculatorModel
from speculators.pipeline.context import Context, EventLog, Listen, Places, read_json
from speculators.pipeline.inputs import conversations
from speculators.pipeline.training import SPECULATOR, speculator_of, train_stage, trained
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import BenchmarkSection, Recipe
from speculators.training.world import World
from speculators.verifier.engine import Engine
from speculators.verifier.sources import fetch_facts, obtain

PACKAGES = ("spec-recipes", "torch", "transformers", "safetensors", "numpy")


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


def run_recipe(recipe: Recipe, *, places: Places, world: World, listen: Listen) -> Outcome:
    """Runs every stage that is not done yet.

    Args:
        recipe: loaded.
        places: where things are kept.
        world: the launch; every process calls this.
        listen: gets the events, on rank 0.

    Raises:
        SpeculatorsError: something is the user's to mend; what was finished stays, and the next call goes on from it.
        KeyboardInterrupt: it was stopped; likewise.
    """
    began = time.monotonic()
    log = EventLog(listen)
    context = make_context(recipe, places, world, log)
    if world.is_main:
        _describe(context)
        log.open(context.run_folder / "events.jsonl")
    if held := trained(context):
        context.skip("prepare", "not needed: training is done")
        context.skip("train", f"{context.run_folder / SPECULATOR} (update {held['step']} of {held['total_steps']})")
    else:
        train_stage(context, conversations(context))
    result = _bench_stage(context)
    return Outcome(
        folder=context.run_folder,
        bench=result,
        seconds=time.monotonic() - began,
        # Linux tells kilobytes, macOS bytes.
        peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if platform.system() == "Darwin" else 1024)
        / 1e9,
    )


def make_context(recipe: Recipe, places: Places, world: World, listen: Listen) -> Context:
    """Obtains the verifier (stage `verifier`) and makes the plan; what the plan refuses is told before the download."""
    section = recipe.verifier
    if section.kind in ("hub", "folder"):
        make_plan(recipe, fetch_facts(section), world_size=world.size)
    began = time.monotonic()
    if world.is_main:
        listen(StageEvent(stage="verifier", status="start", detail=section.model))
        folder = obtain(section, cache=places.cache, progress=listen)
        listen(StageEvent(stage="verifier", status="done", detail=str(folder), seconds=time.monotonic() - began))
    world.barrier()
    if not world.is_main:
        folder = obtain(section, cache=places.cache)
    plan = make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=world.size)
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def _describe(context: Context) -> None:
    """Writes what was asked for and what it means here into the run folder."""
    folder, recipe = context.run_folder, context.recipe
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.file is not None:
        shutil.copyfile(recipe.file, folder / "recipe.toml")
    plan = context.plan.to_dict()
    write_json(folder / "plan.json", plan)
    write_json(folder / "lock.json", _lock(context.plan, context.world))


def _lock(plan: Plan, world: World) -> dict[str, Any]:
    return {
        "format": 1,
        "seed": plan.recipe.seed,
        "fingerprints": {stage.name: stage.fingerprint for stage in plan.stages},
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "platform": {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
    }


def _bench_stage(context: Context) -> dict[str, Any] | None:
    section, world = context.recipe.benchmark, context.world
    if not section.suites:
        context.skip("bench", "the recipe names no suite")
        return None
    fingerprint = context.plan.stage("bench").fingerprint
    file = context.run_folder / "bench" / f"{fingerprint[:8]}.json"
    held = read_json(file)
    if held is not None and held["fingerprint"] == fingerprint:
        context.skip("bench", str(file))
        return dict(held)
    lacking = _lacking_hooks(context.recipe.algorithm.name)
    if lacking:
        context.tell(WarningEvent(message=f"bench is left out: {context.recipe.algorithm.name} has no {lacking}"))
        return None
    result = None
    if world.is_main:
        with context.stage("bench"):
            model = speculator_of(context.run_folder, world.device)
            result = measure(context, model, context.engine(context.recipe.verifier.dtype), section)
            result = {"fingerprint": fingerprint, **result}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result)
    world.barrier()
    return result


def _lacking_hooks(name: str) -> str:
    model_class = SpeculatorModel.get_class(name)
    hooks = ("replay", "draft")
    return " and no ".join(h for h in hooks if getattr(model_class, h) is getattr(SpeculatorModel, h))


def measure(context: Context, model: SpeculatorModel, engine: Engine, section: BenchmarkSection) -> dict[str, Any]:
    """Measures a speculator as the section says; returns the result as JSON values."""
    name = context.run_folder.name
    found = bench(model, engine, section, name=name, seed=context.recipe.seed, progress=context.progress)
    return found.to_json()
