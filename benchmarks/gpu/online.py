"""The part `online`: `spec run` trains for a verifier of 8B beside it, from its folder of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.command import spec
from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.verifier import random_verifier
from speculators.recipe.catalog import recipes_folder

UPDATES = 6
RECIPE = """
format = 1
name = "online"
version = "1.0.0"
verifier = {{ model = "{verifier}", dtype = "bfloat16" }}
algorithm = {{ name = "eagle3", draft_vocab_size = {drafts} }}
benchmark = {{ suites = [] }}

[data]
sources = [{{ path = "{data}", split = "train", take = {take} }}]
max_tokens = 2048
hidden_states = "online"

[schedule]
max_steps = {updates}
tokens_per_step = {tokens}
checkpoint_every = {updates}
optimizer = {{ name = "adamw", lr = 3e-4 }}
"""


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields one line."""
    yield judged("six updates", partial(trained, setup))


def speculator(setup: PartSetup) -> Path:
    """The folder of the trained speculator; it exists once `lines` has passed."""
    return next((setup.folder / "online").glob("*/speculator"), setup.folder / "online" / "speculator")


def trained(setup: PartSetup) -> Judged:
    """Runs the recipe above; every loss must be a number."""
    verifier = random_verifier(setup)
    setup.release()
    tokens, take, drafts = (2048, 24, 256) if setup.small else (16_384, 400, 32_000)
    recipe = setup.folder / "online.toml"
    data = recipes_folder() / "data" / "quickstart.jsonl"
    sizes = {"tokens": tokens, "take": take, "drafts": drafts, "updates": UPDATES}
    recipe.write_text(RECIPE.format(verifier=verifier, data=data, **sizes), encoding="utf-8")
    runs = setup.folder / "online"
    ended = spec("run", recipe, "--quiet", "--runs", runs, seconds=setup.left, folder=setup.folder)
    if ended.code != 0:
        return {}, f"spec run ended with {ended.code}: {ended.tail}"
    (log,) = runs.glob("*/events.jsonl")
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "StepEvent"]
    figures = {
        "updates": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        # The first ones start kernels and fill caches.
        "tokens_per_s": max(event["tokens_per_second"] for event in steps),
    }
    sound = len(steps) == UPDATES and all(math.isfinite(event["loss"]) for event in steps)
    return figures, "" if sound else f"{len(steps)} updates, with losses {[event['loss'] for event in steps]}"
