"""What happens before the first stage: folders that all processes share, the verifier, the plan on this device."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import attrs
import torch

from speculators.errors import ArtifactError
from speculators.events import Listen, StageEvent, WarningEvent
from speculators.facts import VerifierFacts
from speculators.files.disk import CACHE_VARIABLE, disk_errors
from speculators.files.locks import locked_or_refused
from speculators.init_from import check_start
from speculators.nn.precision import has_bf16_products
from speculators.pipeline.arguments import training_kwargs
from speculators.pipeline.context import Context
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.sources import existing_folder, fetch_facts, obtain


def working_in(folder: Path) -> AbstractContextManager[None]:
    """Keeps a run to one launch at a time: with two at work neither result would be whole."""
    hint = "wait until it ends, or give this one a folder of its own: --runs FOLDER"
    return locked_or_refused(folder, ArtifactError(f"{folder}: another launch is working on this run", hint=hint))


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
    plan = on_device(make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=world.size), world.device)
    if recipe.algorithm.config.init_from is not None:
        check_start(recipe.algorithm.name, plan.facts, training_kwargs(plan, None, None))
    if world.is_main and (words := precision_warning(plan, world.device)):
        listen(WarningEvent(message=words))
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def on_device(plan: Plan, device: torch.device) -> Plan:
    """Returns the plan with the precision that the device has; the fingerprints are the same on every machine."""
    if plan.precision == "bf16" and not has_bf16_products(device.type):
        return attrs.evolve(plan, precision="fp32")
    return plan


def on_this_machine(plan: Plan) -> Plan:
    """Returns the plan on this machine: its GPU, or its CPU where it has none."""
    return on_device(plan, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def precision_warning(plan: Plan, device: torch.device) -> str:
    """Returns what computes in float32 instead of bf16, and the consequence, in words; "" where nothing does."""
    asked = bf16_parts(plan.recipe)
    if not asked or has_bf16_products(device.type):
        return ""
    words = "the same recipe, other last digits than on a machine that has them, twice the memory of what they hold"
    return f"this CPU has no bf16 products: {asked} compute in float32 ({words})"


def bf16_parts(recipe: Recipe) -> str:
    """Returns which parts of a recipe ask for bf16, in words."""
    data = recipe.data
    asked = {
        "verifier": recipe.verifier.dtype == "bfloat16",
        "answers": data.regenerate is not None and data.regenerate.dtype == "bfloat16",
        "states": data.states_dtype == "bfloat16",
        "training": recipe.schedule.precision == "bf16",
    }
    return ", ".join(name for name, wanted in asked.items() if wanted)


def check_shared(places: Places, world: World) -> None:
    """Checks that every process sees what rank 0 writes into the cache and the runs folder; every process calls this.

    Raises:
        ArtifactError: on every process, if one does not; names its machine, the folders and the mend.
    """
    if world.size == 1:
        return
    folders = (places.cache, places.runs)
    # A name that nobody has looked up before: a network's file system remembers for a while what was not there.
    name = world.broadcast(f".shared-{uuid.uuid4().hex}")
    try:
        # What keeps rank 0 from writing is told by all: the others would wait for it.
        if problem := world.broadcast(_write(folders, name) if world.is_main else None):
            raise ArtifactError(problem)
        lacking = [str(folder) for folder in folders if not (folder / name).exists()]
        told = world.gather((socket.gethostname(), lacking))
    finally:
        if world.is_main:
            for folder in folders:
                # Where it could not be written, which was told.
                with suppress(OSError):
                    (folder / name).unlink()
    apart = {f"{host}: {folder}": None for host, theirs in told for folder in theirs}
    if apart:
        raise ArtifactError(
            f"not the folder that the first process writes to, on {'; '.join(apart)}",
            hint=f"set {CACHE_VARIABLE} and --runs to a folder that all nodes share",
        )


def _write(folders: Sequence[Path], name: str) -> str | None:
    """Writes an empty file into each folder; returns what kept it from that, in words."""
    try:
        for folder in folders:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    except ArtifactError as error:
        return str(error)
    return None
