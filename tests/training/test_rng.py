"""Random numbers and interruptions."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from speculators.training.rng import capture, deterministic, restore, seed_row


def draw():
    return random.gauss(0, 1), float(np.random.randn()), torch.rand(1).item()


def test_restored_generators_go_on_where_they_were():
    """Python, numpy and torch draw the same after a restore through JSON, also in the middle of a pair of gaussians."""
    deterministic(3)
    draw()
    state = json.loads(json.dumps(capture()))
    wanted = [draw() for _ in range(3)]
    deterministic(4)
    restore(state)
    assert [draw() for _ in range(3)] == wanted


def test_a_row_draws_the_same_whatever_ran_before_it():
    """A row's numbers depend on seed, step and place in the global batch, and on nothing else."""

    def row(*key):
        seed_row(*key)
        return torch.rand(1).item()

    first = row(0, 5, 2)
    torch.rand(100)
    assert row(0, 5, 2) == first
    assert len({first, row(1, 5, 2), row(0, 6, 2), row(0, 5, 3), row(0, 2, 5)}) == 5
