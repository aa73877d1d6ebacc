"""The stage `capture`: the verifier's hidden states, on disk or on the fly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from speculators.data.batches import StateSource
from speculators.data.capture import Capture, OnlineStates, StateWriter, fill
from speculators.data.encoded import Conversations
from speculators.data.store import DamagedShards, StateStore, StoreLayout
from speculators.errors import ArtifactError
from speculators.events import WarningEvent
from speculators.files.folders import read_manifest
from speculators.pipeline.context import Context
from speculators.pipeline.server_states import fill_from_server
from speculators.verifier.capture import CAPTURE_TOKENS


def state_source(context: Context, prepared: Conversations) -> StateSource:
    """Returns where training reads the verifier's states: stage `capture`, or the verifier itself."""
    dtype = context.recipe.data.states_dtype
    if context.recipe.data.hidden_states == "online":
        return OnlineStates(prepared, _capture(context), getattr(torch, dtype))
    folder = context.places.states(context.plan)
    with context.alone(folder, "capture"):
        return _store(context, prepared, folder)


def _store(context: Context, prepared: Conversations, folder: Path) -> StateStore:
    world, key = context.world, context.plan.stage("capture").fingerprint
    captured, missing = world.broadcast(_look(context, folder, key) if world.is_main else None)
    if captured:
        context.skip("capture", f"the states of {len(prepared)} conversations are in {folder}")
    else:
        with context.stage("capture") as words:
            how = _fill(context, prepared, folder, missing)
            words.append(f"{prepared.lengths.sum():,} tokens{how}, {_gigabytes(folder):.2f} GB in {folder}")
    store = StateStore.open(folder, key=key)
    context.note("capture", {held["file"]: held["sha256"] for held in read_manifest(folder)["shards"]})
    return store


def _look(context: Context, folder: Path, key: str) -> tuple[bool, list[int] | None]:
    """Returns whether the store is there, each shard hashed, and which ones it lacks, None if that is not known yet."""
    try:
        StateStore.open(folder, key=key, verify=True)
    except DamagedShards as error:
        context.tell(WarningEvent(message=f"{str(error).partition(chr(10))[0]}: captured again"))
        return False, list(error.shards)
    except ArtifactError:
        return False, None
    return True, []


def _capture(context: Context) -> Capture:
    engine, tokens = context.engine(context.recipe.data.states_dtype), CAPTURE_TOKENS[context.world.device.type]
    return lambda rows: engine.capture_all(rows, context.plan.target_layer_ids, batch_tokens=tokens)


def _fill(context: Context, prepared: Conversations, folder: Path, missing: Iterable[int] | None) -> str:
    """Fills the store; returns by whom, in words.

    Args:
        missing: the shards that it lacks; None reads those that are there.
    """
    width, world, plan = context.plan.facts.hidden_size, context.world, context.plan
    layout = StoreLayout(
        key=plan.stage("capture").fingerprint,
        lengths=prepared.lengths.tolist(),
        aux_width=len(plan.target_layer_ids) * width,
        width=width,
        dtype=context.recipe.data.states_dtype,
    )
    # Before the verifier is loaded: a disk without room is told at once. Rank 0 alone looks at the shards that are
    # there; by the time that another had read them all, it would find some that are being written now.
    writer = StateWriter(folder, layout, missing=missing, progress=context.tell) if world.is_main else None
    lacking = world.broadcast(None if writer is None else writer.missing())
    writer, how = writer or StateWriter(folder, layout, missing=lacking), ""
    if context.recipe.data.served:
        how = f" {fill_from_server(context, writer, prepared)}"
    else:
        fill(writer, prepared, _capture(context), rank=world.rank, world_size=world.size, progress=context.tell)
    world.barrier()
    if world.is_main:
        writer.finish()
    world.barrier()
    return how


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e9
