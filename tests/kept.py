"""Runs of the real SmolLM2 that several tests share: trained once, and stored beside the cache of their verifier."""

from __future__ import annotations

from collections.abc import Sequence

from speculators.files.disk import cache_folder
from speculators.pipeline import Places, RunOutcome, run_recipe
from speculators.pipeline.run_lock import code_here
from speculators.recipe.load import load_recipe
from speculators.training.world import World


def kept_run(recipe: str, overrides: Sequence[str] = ()) -> RunOutcome:
    """Returns the result of a run of a shipped recipe, training it if it does not exist yet."""
    # Runs that other versions of our code trained must not be tested.
    places = Places(runs=cache_folder() / "kept" / code_here().sources[:12], cache=cache_folder())
    outcome = run_recipe(load_recipe(recipe, overrides), places=places, world=World(), listen=lambda event: None)
    assert outcome.bench is not None
    assert outcome.bench.agrees, "replay and live decode differ"
    return outcome
