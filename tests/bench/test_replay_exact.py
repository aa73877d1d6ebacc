"""Replay's probabilities at T > 0 are those of the rules of verification, followed to every outcome."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from decoding.test_verify import TEMPERATURE, World, drawn_chain, emitted

from speculators.bench.replay import replay
from speculators.bench.rows import JudgedResponse, Response


class _Chain:
    """Replays the drafter of `World`, whose distribution follows from the token before."""

    def __init__(self, world: World) -> None:
        self.logits = TEMPERATURE * world.q.log()
        self.draft_to_target = torch.arange(world.q.shape[1])

    def replay(self, *, input_ids, num_speculative_tokens, **_):
        for depth in range(1, num_speculative_tokens + 1):
            yield self.logits[input_ids[0].roll(-depth)]


@pytest.mark.parametrize("block", [False, True])
def test_sampled_acceptance_is_what_every_outcome_of_a_round_gives(block):
    """For each sequence that may be emitted: the probability that its first j tokens were accepted drafts, given that
    it was emitted, from replay and from following a round of three drafts to all its outcomes; 1e-5 is rounding."""
    world, k = World.of(4), 3
    joint = emitted(world, partial(drawn_chain, length=k), block=block)
    exact = world.continued(world.p[-1], k + 1)
    # The root, token -1, is the last token that is known when the round begins.
    every = [(-1, *tail) for tail in itertools.product(range(4), repeat=k + 1)]
    log_p = [torch.tensor([0.0, *(float(world.p[a, b].log()) for a, b in itertools.pairwise(y))]) for y in every]
    rows = [
        JudgedResponse(
            response=Response(id="", category="", tokens=(0, *y), prompt_length=1),
            hidden_states=torch.zeros(k + 3, 1),
            log_p=each,
            cut=0,
        )
        for y, each in zip(every, log_p, strict=True)
    ]
    replayed = replay(_Chain(world), rows, k_max=k, temperature=TEMPERATURE, block_verification=block)
    for j in range(1, k + 1):
        accepted = sum(part for length, part in joint.items() if length > j) / exact
        predicted = [table[0, :j].prod() for table in replayed.acceptance]
        np.testing.assert_allclose(predicted, accepted.flatten(), atol=1e-5)
