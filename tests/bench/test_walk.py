"""The recurrences give the same numbers as enumerating every possible walk."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.bench.walk import greedy_rounds, round_moments, walk, walk_places

K = 3


def _tables(seed: int, lengths: list[int], k_max: int = K) -> list[np.ndarray]:
    """Random acceptance tables; depths past the end hold 0."""
    random = np.random.default_rng(seed)
    tables = []
    for length in lengths:
        table = random.random((length, k_max))
        table[np.arange(length)[:, None] + np.arange(k_max) >= length] = 0.0
        tables.append(table)
    return tables


def _enumerate(table: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Follows every walk with its probability: rounds, their square, reached and accepted by position; rounds begun at
    each anchor, and the tokens that they emit."""
    length = len(table)
    total = {"rounds": 0.0, "square": 0.0, "reached": np.zeros(k), "accepted": np.zeros(k)}
    total |= {"begun": np.zeros(length), "emitted": np.zeros(length)}

    def follow(anchor, probability, rounds, reached, accepted):
        if anchor >= length:
            total["rounds"] += probability * rounds
            total["square"] += probability * rounds**2
            total["reached"] += probability * reached
            total["accepted"] += probability * accepted
            return
        survive = 1.0
        for j in range(k + 1):
            fails = 1.0 if j == k or anchor + j >= length else 1.0 - table[anchor, j]
            seen = (np.arange(k) < j + 1) & (anchor + np.arange(k) < length)
            if survive * fails > 0:
                total["begun"][anchor] += probability * survive * fails
                total["emitted"][anchor] += probability * survive * fails * min(j + 1, length - anchor)
                more = np.arange(k) < j
                follow(anchor + j + 1, probability * survive * fails, rounds + 1, reached + seen, accepted + more)
            if fails == 1.0:
                break
            survive *= table[anchor, j]

    follow(0, 1.0, 0, np.zeros(k), np.zeros(k))
    return total


@pytest.mark.parametrize("k", [1, 2, 3])
def test_expected_counts_are_those_of_all_walks(k):
    """Rounds, their variance and acceptance by position equal the sum over every path, at every length."""
    tables = _tables(0, [0, 1, 2, 5, 7])
    counts = walk(tables, k)
    mean, variance = round_moments(tables, k)
    for row, table in enumerate(tables):
        every = _enumerate(table, k)
        assert counts.tokens[row] == len(table)
        assert counts.rounds[row] == pytest.approx(every["rounds"])
        assert mean[row] == pytest.approx(every["rounds"])
        assert variance[row] == pytest.approx(every["square"] - every["rounds"] ** 2, abs=1e-9)
        np.testing.assert_allclose(counts.reached[row], every["reached"], atol=1e-12)
        np.testing.assert_allclose(counts.accepted[row], every["accepted"], atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rounds_and_tokens_of_each_anchor_are_those_of_all_walks(k):
    """A visit counts with its probability, and so do the tokens of every way in which its round can end."""
    tables = _tables(2, [0, 1, 2, 5, 7])
    begun, emitted = walk_places(tables, k)
    for row, table in enumerate(tables):
        every = _enumerate(table, k)
        np.testing.assert_allclose(begun[row, : len(table)], every["begun"], atol=1e-12)
        np.testing.assert_allclose(emitted[row, : len(table)], every["emitted"], atol=1e-12)
        assert not begun[row, len(table) :].any()
        assert not emitted[row, len(table) :].any()


def test_the_forward_and_the_backward_recurrence_agree_on_long_responses():
    """The sum of visits, computed forward, equals the expected rounds, computed backward."""
    tables = _tables(1, [40, 160, 3], k_max=7)
    np.testing.assert_allclose(walk(tables, 7).rounds, round_moments(tables, 7)[0])


def test_tokens_are_rounds_plus_accepted_drafts_unless_the_end_cuts():
    """Each round emits its accepted drafts and one token; a response whose last round is cut loses that one."""
    table = np.ones((8, 3))
    table[np.arange(8)[:, None] + np.arange(3) >= 8] = 0.0
    counts = walk([table], 3)
    assert (counts.tau, counts.rounds[0]) == (4.0, 2.0)
    cut = walk([table[:7]], 3)
    assert cut.rounds[0] == 2.0


def test_tau_is_not_the_mean_over_anchors():
    """Anchors are not visited uniformly: here every second anchor is perfect and is always jumped to."""
    table = np.zeros((9, 1))
    table[::2] = 1.0
    table[-1] = 0.0
    counts = walk([table], 1)
    assert counts.tau == pytest.approx(9 / 5)
    assert 1 + table.mean() < 1.5
    assert counts.by_position == pytest.approx((4 / 5,))


def test_a_perfect_and_a_hopeless_drafter_are_the_bounds():
    """tau is 1 without acceptance and K + 1 with all of it, up to the cut at the end."""
    length = 4 * 25
    nothing = np.zeros((length, K))
    assert walk([nothing], K).tau == 1.0
    assert round_moments([nothing], K)[1][0] == 0.0
    everything = np.ones((length, K))
    everything[np.arange(length)[:, None] + np.arange(K) >= length] = 0.0
    assert walk([everything], K).tau == K + 1
    assert walk([everything], K).by_position_conditional == (1.0, 1.0, 1.0)


def test_the_greedy_walk_is_the_only_one_with_probability_one():
    """With zeros and ones the expected counts are those of one walk, whose rounds are listed."""
    table = (np.random.default_rng(5).random((30, 4)) < 0.6).astype(float)
    table[np.arange(30)[:, None] + np.arange(4) >= 30] = 0.0
    for k in (1, 2, 4):
        rounds = greedy_rounds(table, k)
        counts = walk([table], k)
        assert counts.rounds[0] == len(rounds)
        assert counts.accepted[0].sum() == sum(accepted for _, accepted in rounds)
        assert round_moments([table], k)[1][0] == pytest.approx(0.0, abs=1e-9)


def test_without_responses_there_is_no_number():
    """Without measurements tau is NaN, neither zero nor one."""
    assert np.isnan(walk([], 2).tau)
    assert np.isnan(walk([np.zeros((0, 2))], 2).tau)
