"""Acceptance by context length and by place in the answer: the rounds and tokens of the walk, sorted into bins."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.bench.bins import TokenBin, bins_by_context, bins_by_place
from speculators.bench.replay import Replayed
from speculators.bench.walk import greedy_rounds, walk

K = 3
PROMPT_LENGTHS = (10, 63, 64, 300)


@pytest.fixture
def replayed() -> Replayed:
    """Four random responses, of which the first two are turns of one prompt."""
    return _replayed(np.random.default_rng(0).random)


def _replayed(random) -> Replayed:
    tables = []
    for length in (200, 65, 1, 130):
        table = random((length, K))
        table[np.arange(length)[:, None] + np.arange(K) >= length] = 0.0
        tables.append(table)
    ids = ("a", "a", "b", "c")
    return Replayed(
        acceptance=tuple(tables), ids=ids, prompt_lengths=PROMPT_LENGTHS, categories=ids, cut_prompts=0, cut_tokens=0
    )


def _sums(bins: tuple[TokenBin, ...]) -> dict[str, np.ndarray]:
    """Adds up tokens and rounds of each prompt over the bins."""
    return {name: sum(np.array(each.by_prompt.get(name, (0, 0))) for each in bins) for name in "abc"}


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("sorted_by", [bins_by_context, bins_by_place])
def test_the_bins_sum_to_the_whole(replayed, sorted_by, k):
    """Every token and every expected round of each prompt is in exactly one bin."""
    counts = walk(replayed.acceptance, k)
    sums = _sums(sorted_by(replayed, k, seed=0))
    for name, rows in {"a": [0, 1], "b": [2], "c": [3]}.items():
        np.testing.assert_allclose(sums[name], [counts.tokens[rows].sum(), counts.rounds[rows].sum()])


@pytest.mark.parametrize(("sorted_by", "before"), [(bins_by_context, PROMPT_LENGTHS), (bins_by_place, (0, 0, 0, 0))])
def test_a_round_is_in_the_bin_of_the_tokens_known_when_it_begins(sorted_by, before):
    """At zeros and ones the walk is a list of rounds: each lies within its bin's range with all that it emits."""
    replayed = _replayed(lambda shape: (np.random.default_rng(1).random(shape) < 0.6).astype(float))
    bins = sorted_by(replayed, K, seed=0)
    assert [each.up_to for each in bins] == sorted(each.up_to for each in bins)
    for each in bins:
        rounds = [
            min(accepted + 1, len(table) - anchor)
            for table, known in zip(replayed.acceptance, before, strict=True)
            for anchor, accepted in greedy_rounds(table, K)
            if each.fewest <= known + anchor + 1 <= each.up_to
        ]
        assert each.tokens == sum(rounds)
        assert each.tau == pytest.approx(sum(rounds) / len(rounds))
        assert each.tau_interval[0] <= each.tau <= each.tau_interval[1]


def test_ranges_are_powers_of_two_from_64_and_empty_ones_are_left_out(replayed):
    """Answers reach up to 200 tokens, contexts up to 430; no round begins with 64 known tokens of a prompt of 64."""
    assert [(each.fewest, each.up_to) for each in bins_by_place(replayed, K, seed=0)] == [
        (1, 64), (65, 128), (129, 256),
    ]  # fmt: skip
    by_context = bins_by_context(replayed, K, seed=0)
    assert [each.up_to for each in by_context] == [64, 128, 256, 512]
    assert [sorted(each.by_prompt) for each in by_context] == [["a"], ["a", "b"], ["a"], ["c"]]
