"""Runs of the real SmolLM2 that several tests look at: trained once, kept with the cache that their verifier is in."""

from __future__ import annotations

from collections.abc import Sequence

from speculators.files.disk import cache_folder
from speculators.pipeline import Places, RunOutcome, run_recipe
from speculators.pipeline.run_lock import code_here
from speculators.recipe.load import load_recipe
from speculators.training.world import World


def kept_run(recipe: str, overrides: Sequence[str] = ()) -> RunOutcome:
    """Returns what a run of a shipped recipe came to; it is trained if it is not there."""
    # What other code of ours trained is not what is tested.
    places = Places(runs=cache_folder() / "kept" / code_here().sources[:12], cache=cache_folder())
    outcome = run_recipe(load_recipe(recipe, overrides), places=places, world=World(), listen=lambda event: None)
    assert outcome.bench is not None
    assert outcome.bench.agrees, "replay and live decode differ"
    return outcome
