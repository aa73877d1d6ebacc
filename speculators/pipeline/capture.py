"""The stage `capture`: the verifier's hidden states for all conversations, stored or computed while training runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators.chunks import CHUNKS
from speculators.data.batches import StateSource
from speculators.data.capture import OnlineStates, StateWriter, fill
from speculators.data.encoded import Conversations
from speculators.data.store import Check, DamagedShards, StateStore, note_file, shard_name
from speculators.data.store_layout import LAYOUT, StoreLayout, shard_tokens_for, store_bytes
from speculators.errors import ArtifactError
from speculators.events import CapturedFacts, WarningEvent
from speculators.files.folders import read_record
from speculators.pipeline.context import Context
from speculators.pipeline.server_states import fill_from_server, streamed_states
from speculators.runs.stages import open_states


def state_source(context: Context, prepared: Conversations) -> StateSource:
    """Gives training the verifier's states: runs the stage unless it is done, or wraps what computes them meanwhile.

    Every process calls this.
    """
    if context.recipe.data.online:
        data, ids = context.recipe.data, context.plan.target_layer_ids
        engine = context.engine(data.capture_dtype)
        return OnlineStates(prepared, lambda rows: engine.capture_packed(rows, ids), data.states_dtype)
    if not context.recipe.data.stored:
        return streamed_states(context, prepared)
    key = context.plan.stage("capture").fingerprint
    if context.recipe.data.store is not None:
        return _uploaded_states(context, prepared)
    folder = context.places.states(key)
    with context.alone(folder, "capture"):
        _capture(context, prepared, folder, key)
        # Rank 0 has just checked every shard; the others open only those that they read.
        store = StateStore.open(folder, key=key, check="none", device=context.world.device)
    context.note_files("capture", store.hashes())
    return store


def _uploaded_states(context: Context, prepared: Conversations) -> StateStore:
    """Opens the states under `data.store`; with `--verify`, rank 0 hashes all of them first."""
    check: Check = "all" if context.verify and context.world.is_main else "none"
    store = open_states(context.plan, context.places, check=check, device=context.world.device)
    context.skip("capture", f"the states of {len(prepared)} conversations are in {store.files.place}")
    context.note_files("capture", store.hashes())
    return store


def _capture(context: Context, prepared: Conversations, folder: Path, key: str) -> None:
    world = context.world
    complete, missing = world.broadcast(_examine(context, folder, key) if world.is_main else None)
    if complete and context.verify:
        complete, missing = _hash_together(context, folder, key)
    if complete:
        context.skip("capture", f"the states of {len(prepared)} conversations are in {folder}")
        return
    with context.stage("capture") as result:
        server = _fill(context, prepared, folder, missing)
        result.facts = CapturedFacts(
            tokens=int(prepared.lengths.sum()),
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            folder=str(folder),
            server=server,
        )


def _examine(context: Context, folder: Path, key: str) -> tuple[bool, list[int] | None]:
    """Says whether the store is complete, by sizes and headers, and which shards it lacks (None if not known yet)."""
    try:
        StateStore.open(folder, key=key)
    except DamagedShards as error:
        return False, _lacking(context, error)
    except ArtifactError:
        return False, None
    return True, []


def _hash_together(context: Context, folder: Path, key: str) -> tuple[bool, list[int]]:
    """Hashes a whole store, each process its share; says as `_examine` what is damaged."""
    world, store = context.world, StateStore.open(folder, key=key, check="none")
    mine = store.damaged(range(world.rank, len(store.layout.shards), world.size))
    problems = {number: what for theirs in world.gather(mine) for number, what in theirs.items()}
    return not problems, _lacking(context, DamagedShards(folder, problems)) if problems else []


def _lacking(context: Context, error: DamagedShards) -> list[int]:
    # The first line says which shards; the hint below it is not for this case, which mends itself.
    context.emit(WarningEvent(message=f"{str(error).partition(chr(10))[0]}: captured again"))
    return list(error.shards)


@contextmanager
def removing_damaged() -> Iterator[None]:
    """Removes the shards that reading in the block finds damaged, so that the next run captures just these again."""
    try:
        yield
    except DamagedShards as error:
        for number in error.shards:
            for file in (note_file(error.folder, number), error.folder / shard_name(number)):
                file.unlink(missing_ok=True)
        raise


def _fill_in_process(context: Context, writer: StateWriter, prepared: Conversations) -> None:
    """Captures what the store lacks with the verifier loaded in this process, or shared by all."""
    world, ids = context.world, context.plan.target_layer_ids
    engine, tokens = context.engine(context.recipe.data.capture_dtype), CHUNKS[world.device.type].capture_tokens
    with engine.together():
        fill(
            writer,
            prepared,
            lambda rows: engine.capture_all(rows, ids, batch_tokens=tokens),
            rank=world.rank,
            world_size=world.size,
            progress=context.emit,
        )


def _fill(context: Context, prepared: Conversations, folder: Path, missing: Iterable[int] | None) -> str:
    """Fills the store.

    Args:
        missing: the shards that it lacks; None finds them by reading those that are there.

    Returns:
        Engine and version of the server that computed the states; "" for this process.
    """
    world, layout = context.world, _layout(context, prepared, folder)
    # Before the verifier is loaded, so that a disk without room is reported at once. Only rank 0 examines the shards:
    # by the time another process had read them all, rank 0 could be writing some of them.
    writer = StateWriter(folder, layout, missing=missing, progress=context.emit) if world.is_main else None
    lacking = world.broadcast(None if writer is None else writer.missing())
    writer, server = writer or StateWriter(folder, layout, missing=lacking), ""
    if context.recipe.data.served:
        server = fill_from_server(context, writer, prepared)
    else:
        _fill_in_process(context, writer, prepared)
    # All shards must be there before rank 0 writes the manifest, and the manifest before anybody opens the store.
    world.barrier()
    if world.is_main:
        writer.finish()
    world.barrier()
    return server


def _layout(context: Context, prepared: Conversations, folder: Path) -> StoreLayout:
    """Lays the store out; keeps the form that an interrupted capture chose, perhaps on another device or version."""
    plan, dtype, width = context.plan, context.recipe.data.states_dtype, context.plan.facts.hidden_size
    if (folder / LAYOUT).exists():
        chosen = StoreLayout.from_json(read_record(folder / LAYOUT))
        form: dict[str, Any] = {"shard_tokens": chosen.shard_tokens, "ends_in_last": chosen.ends_in_last}
    else:
        layers = len(plan.target_layer_ids) - plan.ends_in_last
        row_bytes = store_bytes(1, aux_width=layers * width, width=width, dtype=dtype)
        least = CHUNKS[context.world.device.type].shard_tokens
        shard_tokens = shard_tokens_for(int(prepared.lengths.sum()), row_bytes, at_least=least)
        form = {"shard_tokens": shard_tokens, "ends_in_last": plan.ends_in_last}
    return StoreLayout(
        key=plan.stage("capture").fingerprint,
        lengths=prepared.lengths,
        aux_width=len(plan.target_layer_ids) * width,
        width=width,
        dtype=dtype,
        **form,
    )
