"""Runs a recipe through all its stages on the stand-in, and prints what happened as JSON: a child process.

python pipeline.py FOLDER RECIPE [KEY=VALUE..]      with hooks.so in LD_PRELOAD and tests/ in PYTHONPATH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from standin.device import CUDA
from standin.whole import whole_device

from speculators.pipeline import Places, run_recipe
from speculators.recipe.load import load_recipe
from speculators.training.world import World


def main() -> None:
    folder, recipe, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    events: list[str] = []
    places = Places(runs=Path(folder) / "runs", cache=Path(folder) / "cache")
    with whole_device():
        outcome = run_recipe(
            load_recipe(recipe, overrides),
            places=places,
            world=World(device=CUDA),
            listen=lambda event: events.append(f"{type(event).__name__} {event}"),
        )
    assert outcome.bench is not None
    print(json.dumps({"agrees": outcome.bench.agrees, "device": outcome.bench.device, "events": events}))


if __name__ == "__main__":
    main()
