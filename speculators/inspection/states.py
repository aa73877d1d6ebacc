"""Compares a sample of the stored states, or of a server's, with the verifier's own (`spec data --check-states`)."""

from __future__ import annotations

import torch

from speculators.data.encoded import Conversations
from speculators.data.store import StateStore
from speculators.errors import ArtifactError, RecipeError
from speculators.events import Listen
from speculators.inspection.on_policy import spread
from speculators.pipeline.context import Context
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.server_states import compare_sample, compare_with_verifier, states_pool
from speculators.pipeline.setup import make_context
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places
from speculators.runs.stages import open_states
from speculators.training.world import World, local_device
from speculators.verifier.states_check import StatesCheck


def check_states(recipe: Recipe, count: int, *, places: Places, listen: Listen) -> StatesCheck:
    """Compares the states of `count` conversations, evenly spread over all, layer by layer.

    Raises:
        RecipeError: the recipe stores no states: training computes them in process when it needs them.
        ArtifactError: nothing is stored yet, and the recipe names no server to ask.
    """
    if recipe.data.online:
        raise RecipeError('--check-states: data.hidden_states = "online" stores no states: there is nothing to compare')
    world = World(device=local_device())
    context = make_context(recipe, places, world, listen)
    prepared = prepared_conversations(context)
    with context.stage("check states") as stage:
        result = _check(context, prepared, spread(count, len(prepared)))
        stage.detail = f"{result.conversations} conversations, {result.tokens:,} tokens"
    return result


def _check(context: Context, prepared: Conversations, indices: list[int]) -> StatesCheck:
    store = _store(context)
    if store is None:
        pool, _ = states_pool(context, prepared)
        return compare_sample(context, pool, prepared, indices)
    rows = [torch.from_numpy(prepared.row(index).input_ids).long() for index in indices]
    kept = store.states(indices)
    return compare_with_verifier(context, rows, kept, source=store.files.place, states_dtype=store.layout.dtype)


def _store(context: Context) -> StateStore | None:
    """Opens the stored states; None where servers are asked: before hours of capture, or if nothing is to be stored."""
    data = context.recipe.data
    if not data.stored:
        return None
    try:
        return open_states(context.plan, context.places)
    except ArtifactError:
        if not data.served:
            raise
        return None
