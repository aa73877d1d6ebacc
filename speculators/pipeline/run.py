"""`run_recipe`: the whole main job, from a recipe to its acceptance table."""

from __future__ import annotations

import platform
import resource
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.run import bench
from speculators.config import VerifierFacts
from speculators.data.files import disk_errors, write_json, write_whole
from speculators.decoding.baselines import check_baseline
from speculators.events import StageEvent, WarningEvent
from speculators.model import SpeculatorModel
from speculators.nn.precision import has_bf16_products
from speculators.pipeline.context import Context, EventLog, Listen, Places
from speculators.pipeline.inputs import conversations
from speculators.pipeline.ondisk import SPECULATOR, bench_file, measured, trained
from speculators.pipeline.rehearsal import is_plugin, rehearse
from speculators.pipeline.training import lacking_hooks, train_stage
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.training.world import World
from speculators.verifier.sources import fetch_facts, held_folder, obtain

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
    if is_plugin(recipe.algorithm.name):
        rehearse(context.plan, context.tell)
    if world.is_main:
        _describe(context)
        log.open(context.run_folder / "events.jsonl")
    if held := world.broadcast(trained(context.plan, places) if world.is_main else None):
        for stage in ("prepare", "capture")[: 2 if recipe.data.hidden_states == "cached" else 1]:
            context.skip(stage, "not needed: training is done")
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
    for baseline in recipe.benchmark.baselines:
        check_baseline(baseline)
    began = time.monotonic()
    if world.is_main:
        held = held_folder(section, cache=places.cache)
        if held is None:
            listen(StageEvent(stage="verifier", status="start", detail=section.model))
        folder = obtain(section, cache=places.cache, progress=listen)
        status, seconds = ("done" if held is None else "skip"), time.monotonic() - began
        listen(StageEvent(stage="verifier", status=status, detail=str(folder), seconds=seconds))
    world.barrier()
    if not world.is_main:
        folder = obtain(section, cache=places.cache)
    plan = settled(make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=world.size), world.device)
    if world.is_main and (asked := bf16_asked(recipe)) and not has_bf16_products(world.device.type):
        words = "same recipe, other last digits than on a machine that has them, twice the memory of what they hold"
        listen(WarningEvent(message=f"this CPU has no bf16 products: {asked} compute in float32 ({words})"))
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def settled(plan: Plan, device: torch.device) -> Plan:
    """Returns the plan with the precision that the device has; the fingerprints are the same on every machine."""
    if plan.precision == "bf16" and not has_bf16_products(device.type):
        return attrs.evolve(plan, precision="fp32")
    return plan


def bf16_asked(recipe: Recipe) -> str:
    """Returns which parts of a recipe ask for bf16, in words."""
    data = recipe.data
    asked = {
        "verifier": recipe.verifier.dtype == "bfloat16",
        "answers": data.regenerate is not None and data.regenerate.dtype == "bfloat16",
        "states": data.states_dtype == "bfloat16",
        "training": recipe.schedule.precision == "bf16",
    }
    return ", ".join(name for name, wanted in asked.items() if wanted)


def _describe(context: Context) -> None:
    """Writes what was asked for and what it means here into the run folder."""
    folder, recipe = context.run_folder, context.recipe
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if recipe.file is not None:
        write_whole(folder / "recipe.toml", recipe.file.read_bytes())
    write_json(folder / "plan.json", context.plan.to_dict())
    write_json(folder / "lock.json", _lock(context.plan, context.world))


def _lock(plan: Plan, world: World) -> dict[str, Any]:
    return {
        "format": 1,
        "seed": plan.recipe.seed,
        "fingerprints": {stage.name: stage.fingerprint for stage in plan.stages},
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "platform": {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "device": world.device.type,
        "bf16_products": has_bf16_products(world.device.type),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
    }


def _bench_stage(context: Context) -> dict[str, Any] | None:
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
            words.append(str(file))
    world.barrier()
    return result


def _measure(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    speculator = SpeculatorModel.from_pretrained(context.run_folder / SPECULATOR, verifier=context.folder)
    model = speculator.to(context.world.device)
    engine = context.engine(recipe.verifier.dtype)
    result = bench(
        model,
        engine,
        recipe.benchmark,
        name=context.run_folder.name,
        seed=recipe.seed,
        progress=context.progress,
        known=context.rows,
    )
    return result.to_json()
