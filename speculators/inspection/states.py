"""`spec data --check-states`: a sample of the stored states, or of the server's, against the verifier's own."""

from __future__ import annotations

import numpy as np
import torch

from speculators.data.encoded import Conversations
from speculators.data.store import StateStore
from speculators.errors import ArtifactError, RecipeError
from speculators.events import Listen
from speculators.pipeline.context import Context
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.server_states import compare_sample, compare_with_verifier, states_client
from speculators.pipeline.setup import make_context
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.states_check import StatesCheck


def check_states(recipe: Recipe, count: int, *, places: Places, listen: Listen) -> StatesCheck:
    """Compares the states of `count` conversations, evenly spread over all, layer by layer.

    Raises:
        RecipeError: nothing is stored: states are computed in process when training asks for them.
        ArtifactError: nothing is stored yet, and no server is named that could be asked.
    """
    if not recipe.data.stored:
        raise RecipeError('--check-states: data.hidden_states = "online" keeps no states, there is nothing to compare')
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    context = make_context(recipe, places, world, listen)
    prepared = prepared_conversations(context)
    chosen = np.unique(np.linspace(0, len(prepared) - 1, min(count, len(prepared))).round().astype(int)).tolist()
    with context.stage("check states") as words:
        found = _stored(context, prepared, chosen)
        words.append(f"{found.conversations} conversations, {found.tokens:,} tokens")
    return found


def _stored(context: Context, prepared: Conversations, chosen: list[int]) -> StatesCheck:
    folder = context.places.states(context.plan)
    try:
        store = StateStore.open(folder, key=context.plan.stage("capture").fingerprint)
    except ArtifactError:
        if not context.recipe.data.served:
            raise
        # Before hours of capture, too, a server can be asked for a sample.
        client, _ = states_client(context)
        return compare_sample(context, client, prepared, chosen)
    rows = [torch.from_numpy(prepared.row(index).input_ids).long() for index in chosen]
    return compare_with_verifier(context, rows, store.states(chosen), source=str(folder))
