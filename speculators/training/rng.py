"""Random numbers that change neither with an interruption nor with the number of processes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def deterministic(seed: int) -> None:
    """Seeds Python's, numpy's and torch's generators, and changes no other global state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_row(seed: int, step: int, row: int) -> None:
    """Seeds torch for one row of one step.

    A forward that draws (dropout, random anchors) then draws the same numbers for this row on any process and after
    any interruption.

    Args:
        row: index of the row in the global batch.
    """
    mixed = np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))


def capture() -> dict[str, Any]:
    """Reads the state of all generators, as JSON values."""
    version, internal, gauss = random.getstate()
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, [int(key) for key in keys], *rest],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Sets all generators to a state that `capture` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
