"""Drafted trees of every algorithm: live decoding is lossless, and replay predicts it round for round."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from speculators.bench.counts import count_decoded
from speculators.bench.replay import replay
from speculators.bench.trees import is_replayed, replay_trees
from speculators.bench.walk import greedy_rounds
from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.decoding.trees import TreeDrafter
from speculators.recipe.tree import parse_tree

from .proof import INPUTS, fit, judged, row_of, scramble

ALGORITHMS = CONFIGS.names()
DEPTH = 3
STATIC = ("1x1x1", "2x1x1", "3x2x1", "4x1", "5")
DYNAMIC = ("dynamic:2", "dynamic:9")


@pytest.fixture(scope="module", params=ALGORITHMS)
def speculator(request, world):
    """A speculator of each algorithm, fitted a little, so that trees are accepted to every depth; and the rows."""
    model, kwargs = world.build(SpeculatorModelConfig.get_class(request.param)(), draft_vocab_size=None)
    fit(model, kwargs, row_of(world, model, 0, 1), steps=12)
    model.eval()
    return model, judged(world, range(5), layer_ids=world.layer_ids(model.config))


def live(world, model, row, shape, k_max=DEPTH):
    """Decodes one prompt greedily with trees."""
    drafter = TreeDrafter(model.draft(), shape)
    return decode(
        CachedVerifier(world.engine.model, drafter.target_layer_ids),
        drafter,
        torch.tensor(row.response.prompt),
        max_new_tokens=len(row.response.answer),
        num_tokens=shape.depth_within(k_max),
        stop_ids=frozenset(world.engine.stop_ids),
    )


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
def test_a_tree_is_lossless_and_replayed_round_for_round(world, speculator, name):
    """The float32 output is the verifier's own; where replay knows the tree, every count is its own, too."""
    (model, rows), shape = speculator, parse_tree(name)
    decoded = [live(world, model, row, shape) for row in rows]
    for row, one in zip(rows, decoded, strict=True):
        assert one.tokens == row.response.answer
        assert {each.drafted for each in one.rounds} == {shape.nodes}
    if not is_replayed(model, shape):
        assert name in DYNAMIC
        return
    depth, chain = shape.depth_within(DEPTH), replay(model, rows, k_max=DEPTH, temperature=0.0)
    replayed = replay_trees(model, rows, [shape], chain, k_max=DEPTH)[name]
    for table, one in zip(replayed.acceptance, decoded, strict=True):
        assert [(each.anchor, each.accepted) for each in one.rounds] == greedy_rounds(table, depth)
    predicted, measured = replayed.counts(depth), count_decoded(decoded, depth)
    for field in attrs.fields(type(predicted)):
        np.testing.assert_array_equal(getattr(predicted, field.name), getattr(measured, field.name))


def test_a_tree_without_siblings_is_the_chain_and_siblings_only_add(speculator):
    """1x1x1 has the tables of K = 3; with more siblings nothing that was accepted is lost, and something is won."""
    model, rows = speculator
    chain = replay(model, rows, k_max=DEPTH, temperature=0.0)
    shapes = [parse_tree(name) for name in ("1x1x1", "2x1x1", "4x1x1", "4x2x1", "4x2x2")]
    trees = replay_trees(model, rows, shapes, chain, k_max=DEPTH)
    for table, own in zip(chain.acceptance, trees["1x1x1"].acceptance, strict=True):
        # The chain's table goes on behind a refused draft; both stop there.
        np.testing.assert_array_equal(table.cumprod(1), own)
    taus = [trees[shape.name].counts(DEPTH).tau for shape in shapes]
    assert taus == sorted(taus)
    assert 1.0 < taus[0] < taus[-1]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in ALGORITHMS), ("dspark", {"markov_head_type": "rnn"})]
)
@torch.no_grad()
def test_the_logits_below_a_path_are_the_replays_whatever_stands_beside_it(world, name, options):
    """The response's own tokens, each behind a decoy with children of its own, have the teacher-forced logits.

    The matrices are random, so that every key that is seen matters: a wrong mask changes logits by a hundredth of the
    largest and more, float32 sums in another order by 2e-5.
    """
    model, _ = world.build(SpeculatorModelConfig.get_class(name)(**options))
    scramble(model).eval()
    row = {key: tensor for key, tensor in row_of(world, model, 1).items() if key in INPUTS}
    tokens, states = row["input_ids"][0], row["hidden_states"][0]
    replayed = list(model.replay(**row, num_speculative_tokens=DEPTH))
    drafter = model.draft()
    state = drafter.begin(tokens[:4], states[:3])
    for anchor in range(2, len(tokens) - DEPTH - 2):
        branches = drafter.begin_tree(state, DEPTH)
        found = [branches.first()[-1]]
        decoy = torch.tensor([7])
        # Nodes of the last level: all but the last stand beside the path, which is the last.
        for depth, token in enumerate(tokens[anchor + 2 : anchor + 1 + DEPTH].split(1)):
            parents = torch.tensor([0, 0] if depth == 0 else [0, 0, 1, 1])
            found.append(branches.below(parents, torch.cat([decoy.expand(len(parents) - 1), token]))[-1])
        for depth, logits in enumerate(found):
            expected = replayed[depth][anchor]
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max(), (anchor, depth)
        drafter.advance(state, tokens[anchor + 2 : anchor + 3], states[anchor + 1 : anchor + 2])
