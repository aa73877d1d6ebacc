"""Everything before the first stage: shared folders are checked, the verifier is obtained, the plan is made."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import attrs
import torch

from speculators.decoding.trial import check_decodes
from speculators.errors import ArtifactError, RecipeError, VerifierError
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
from speculators.runs.places import Places, RunFolder
from speculators.training.world import World, local_device
from speculators.verifier.sharded import check_can_load_parts
from speculators.verifier.sources import existing_folder, fetch_facts, obtain
from speculators.verifier.supported import architecture_problems, missing_packages
from speculators.verifier.weights import load_head


def check_shared(places: Places, world: World) -> None:
    """Checks that every process sees what rank 0 writes into the cache and the runs folder; every process calls this.

    Raises:
        ArtifactError: on every process, if one does not; names its machine, the folders and the remedy.
    """
    if world.size == 1:
        return
    folders = (places.cache, places.runs)
    # A name that nobody has looked up before: network file systems cache for a while that a file does not exist.
    name = world.broadcast(f".shared-{uuid.uuid4().hex}")
    try:
        # All processes raise rank 0's problem; otherwise the others would wait for it forever.
        if problem := world.broadcast(_write(folders, name) if world.is_main else None):
            raise ArtifactError(problem)
        unseen = [str(folder) for folder in folders if not (folder / name).exists()]
        reports = world.gather((socket.gethostname(), unseen))
    finally:
        if world.is_main:
            for folder in folders:
                # It is missing where it could not be written, which is reported above.
                with suppress(OSError):
                    (folder / name).unlink()
    apart = {f"{host}: {folder}": None for host, theirs in reports for folder in theirs}
    if apart:
        raise ArtifactError(
            f"not the folder that the first process writes to, on {'; '.join(apart)}",
            hint=f"set {CACHE_VARIABLE} and --runs to a folder that all nodes share",
        )


def _write(folders: Sequence[Path], name: str) -> str | None:
    """Writes an empty file into each folder; returns the message of the error that prevents it."""
    try:
        for folder in folders:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    except ArtifactError as error:
        return str(error)
    return None


def make_context(recipe: Recipe, places: Places, world: World, listen: Listen) -> Context:
    """Obtains the verifier (stage `verifier`) and makes the plan; what the plan refuses is raised before the download.

    Raises:
        SpeculatorsError: the verifier cannot be obtained, or the recipe does not fit it.
    """
    section = recipe.verifier
    if world.size > 1 and recipe.distributed.shard_verifier and recipe.loads_verifier:
        check_can_load_parts()
    if section.kind in ("hub", "folder"):
        facts = fetch_facts(section)
        make_plan(recipe, facts, world_size=world.size)
        refuse_unsupported(recipe, facts)
        if recipe.loads_verifier and (problems := missing_packages(recipe, facts)):
            raise RecipeError(problems)
    began = time.monotonic()
    if world.is_main:
        existing = existing_folder(section, cache=places.verifiers)
        if existing is None:
            listen(StageEvent(stage="verifier", status="start", detail=section.model))
        folder = obtain(section, cache=places.verifiers, progress=listen)
        status, seconds = ("done" if existing is None else "skip"), time.monotonic() - began
        listen(StageEvent(stage="verifier", status=status, detail=str(folder), seconds=seconds))
    world.barrier()
    if not world.is_main:
        folder = obtain(section, cache=places.verifiers)
    plan = on_device(make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=world.size), world.device)
    if recipe.algorithm.config.init_from is not None:
        check_start(recipe.algorithm.name, plan.facts, training_kwargs(plan, None, None))
    if world.is_main and (warning := precision_warning(plan, world.device)):
        listen(WarningEvent(message=warning))
    context = Context(recipe=plan.recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)
    context.use_cache()
    return context


def refuse_unsupported(recipe: Recipe, facts: VerifierFacts) -> None:
    """Raises RecipeError for a verifier whose architecture cannot be captured from, drafted for or measured."""
    if problems := architecture_problems(recipe, facts):
        raise RecipeError(problems)


def try_verifier(context: Context) -> None:
    """Decodes a few tokens with the verifier before anything is spent; every process calls this.

    Raises:
        VerifierError: on every process, if its head or its decoding with drafts fails; says which.
    """
    failure = ""
    with context.lead(context.recipe.verifier.dtype) as engine:
        if engine is not None:
            try:
                engine.check_head(load_head(engine.folder, engine.facts).to(engine.device))
                # A sharded verifier decodes no drafts: see `bench_stage`.
                if not engine.is_sharded:
                    check_decodes(engine)
            except VerifierError as error:
                failure = str(error)
    # All processes raise rank 0's problem; otherwise the others would wait for it forever.
    if failure := context.world.broadcast(failure):
        raise VerifierError(failure)


def on_device(plan: Plan, device: torch.device) -> Plan:
    """Adjusts a plan's precision to the device: bf16 where supported, float32 otherwise.

    Fingerprints stay the same, so that a run can resume on any device.
    """
    if plan.precision == "bf16" and not has_bf16_products(device.type):
        return attrs.evolve(plan, precision="fp32")
    return plan


def on_this_machine(plan: Plan) -> Plan:
    """Adjusts a plan's precision to this machine's GPU, or to its CPU if it has none."""
    return on_device(plan, local_device())


def precision_warning(plan: Plan, device: torch.device) -> str:
    """Describes what computes in float32 instead of bf16, and the consequence; "" if nothing does."""
    parts = bf16_parts(plan.recipe)
    if not parts or has_bf16_products(device.type):
        return ""
    kind = "GPU" if device.type == "cuda" else "CPU"
    return (
        f"this {kind} has no bf16 products: {parts} compute in float32 "
        "(results differ in the last digits, and these tensors take twice the memory)"
    )


def bf16_parts(recipe: Recipe) -> str:
    """Lists the parts of a recipe that ask for bf16, joined by commas."""
    data = recipe.data
    parts = {
        "verifier": recipe.verifier.dtype == "bfloat16",
        "answers": data.regenerate is not None and data.regenerate.dtype == "bfloat16",
        "states": data.capture_dtype == "bfloat16",
        "training": recipe.schedule.precision == "bf16",
    }
    return ", ".join(name for name, is_bf16 in parts.items() if is_bf16)


def working_in(run: RunFolder) -> AbstractContextManager[None]:
    """Keeps a run to one launch at a time: with two at work neither result would be whole."""
    hint = "wait until it ends, or give this one a folder of its own: --runs FOLDER"
    return locked_or_refused(run.path, ArtifactError(f"{run.path}: another launch is working on this run", hint=hint))
