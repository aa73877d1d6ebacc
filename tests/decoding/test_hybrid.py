"""A hybrid proposes what its look-up finds and drafts with its speculator elsewhere, which misses no token."""

from __future__ import annotations

import pytest
import torch
from toys import ToySpeculator

from speculators.decoding.baselines import SHORTEST_MATCH, make_baseline
from speculators.decoding.hybrid import HybridDrafter
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.suffix import SuffixDrafter
from speculators.drafter import Drafter

K = 3
WIDTH = 8
# 1 2 3 occurs twice: after its second occurrence a match of three proposes 4 5 6.
REPEATED = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


class Watched:
    """A speculator's drafter that notes each call."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.target_layer_ids = drafter.target_layer_ids
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*args, **options):
            self.calls.append(name)
            return getattr(self.drafter, name)(*args, **options)

        return call


def _toy() -> ToySpeculator:
    return ToySpeculator(state_size=WIDTH, vocab_size=16, target_layer_ids=(1,))


def _states(tokens: list[int]) -> torch.Tensor:
    """Hidden states of all tokens but the last."""
    return torch.randn(len(tokens) - 1, WIDTH, generator=torch.Generator().manual_seed(len(tokens)))


def _propose(drafter, state, temperature=0.0):
    return drafter.propose(state, num_tokens=K, temperature=temperature, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("look_up", [NgramDrafter, SuffixDrafter])
def test_a_match_proposes_where_it_is_long_enough_and_the_speculator_elsewhere(look_up):
    """A match of three tokens is enough for 3 and too short for 4."""
    toy, states = _toy(), _states(REPEATED)
    alone = toy.draft()
    drafted = _propose(alone, alone.begin(torch.tensor(REPEATED), states)).tokens.tolist()
    for shortest, expected in ((3, [4, 5, 6]), (4, drafted)):
        drafter = HybridDrafter(look_up(shortest=shortest, longest=8), toy.draft())
        assert _propose(drafter, drafter.begin(torch.tensor(REPEATED), states)).tokens.tolist() == expected
    assert drafted != [4, 5, 6]


@torch.no_grad()
def test_a_round_with_a_match_runs_nothing_of_the_speculator_which_reads_it_later():
    """Its next draft is, in every probability, that of a drafter that saw all tokens at once."""
    toy = _toy()
    watched = Watched(toy.draft())
    drafter = HybridDrafter(NgramDrafter(shortest=3), watched)
    whole = [*REPEATED, 4, 5, 6, 7, 1, 2, 9, 8]
    states = torch.randn(len(whole) - 1, WIDTH, generator=torch.Generator().manual_seed(0))
    state = drafter.begin(torch.tensor(REPEATED), states[: len(REPEATED) - 1])
    for start, stop in ((10, 14), (14, 16), (16, 18)):
        assert _propose(drafter, state).probs is None, "a match is certain"
        drafter.advance(state, torch.tensor(whole[start:stop]), states[start - 1 : stop - 1])
    assert watched.calls == ["begin"]
    proposal = _propose(drafter, state, temperature=1.0)
    assert watched.calls == ["begin", "advance", "propose"]
    alone = toy.draft()
    expected = _propose(alone, alone.begin(torch.tensor(whole), states), temperature=1.0)
    torch.testing.assert_close(proposal.probs, expected.probs)
    # Nothing is read twice.
    _propose(drafter, state)
    assert watched.calls[3:] == ["propose"]


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_its_look_up_is_the_baselines_own_but_for_short_matches(name):
    """By name, a hybrid's look-up leaves out matches below the default length."""
    single, hybrid = make_baseline(name, None), make_baseline(f"hybrid:{name}", None)
    assert (single.hybrid, hybrid.hybrid) == (False, True)
    assert type(single.draft()) is type(hybrid.draft())
    assert (single.draft().shortest, hybrid.draft().shortest) == (1, SHORTEST_MATCH[name])
    assert isinstance(hybrid.drafter(_toy().draft), HybridDrafter)
    assert type(single.drafter(_toy().draft)) is type(single.draft())
