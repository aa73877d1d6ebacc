"""Runs a recipe through all its stages on the stand-in, and prints what happened as JSON: a child process.

python pipeline.py FOLDER RECIPE [KEY=VALUE..]      with hooks.so in LD_PRELOAD and tests/ in PYTHONPATH
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint.filesystem as checkpoint_files
from standin.device import CUDA, device
from torch.utils._python_dispatch import _disable_current_modes

from speculators.data import prefetch
from speculators.pipeline import Places, run_recipe
from speculators.recipe.load import load_recipe
from speculators.training.world import World
from speculators.verifier import engine
from speculators.verifier.tiny import make_tiny_verifier


class AtOnce:
    """Does work when it is handed in: the stand-in's device belongs to one thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


class OneByOne(checkpoint_files._SerialCpuLoader):
    """Copies tensors for a checkpoint without streams."""

    def __init__(self, resolve: Any, **_: Any) -> None:
        super().__init__(resolve)


def on_host(load: Any) -> Any:
    """Loads a model as on a machine without a device, as Engine does before it moves the model there."""

    def loaded(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return load(*arguments, **named)

    return loaded


def main() -> None:
    folder, recipe, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    events: list[str] = []
    places = Places(runs=Path(folder) / "runs", cache=Path(folder) / "cache")
    # transformers imports a model's code when one is loaded, and that must not see the stand-in.
    engine.Engine(make_tiny_verifier(Path(folder) / "imported"))
    with (
        patch.object(prefetch, "ThreadPoolExecutor", AtOnce),
        patch.object(checkpoint_files, "_OverlappingCpuLoader", OneByOne),
        patch.object(engine, "_load", on_host(engine._load)),
        patch("torch.cuda.get_rng_state", torch.get_rng_state),
        patch("torch.cuda.set_rng_state", torch.set_rng_state),
        # Copies are done when they are asked for.
        patch("torch.cuda.current_stream"),
        device(),
    ):
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
