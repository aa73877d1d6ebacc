"""The comparison behind every diagnosis: its power and its rate of false alarms over all alternatives together."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from speculators.doctor import paired
from speculators.doctor.paired import (
    ALTERNATIVES,
    FALSE_ALARM,
    LEVEL,
    SINGLES,
    chance,
    compare,
    level_weights,
    sign_flip,
    significant,
)
from speculators.doctor.trials import Trial, reciprocal_ranks

ANSWERS, PLACES, KINDS = 24, 60, 50


def trial(*tables: np.ndarray) -> Trial:
    return Trial(tuple(tables), (), torch.empty(0))


def drafts(rng: np.random.Generator, rate: float, answers: int = ANSWERS, places: int = PLACES) -> Trial:
    return trial(*((rng.random((places, 3)) < rate).astype(float) for _ in range(answers)))


def test_the_sign_flip_test_is_exact_on_a_hand_counted_case() -> None:
    """The eight signings of 1, 2, 3 have the largest sums 6 and 4: p of 6 is 1/8, p of 4 is 2/8; zeros do not count."""
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / 8)
    assert sign_flip(np.array([1.0, 0.0, 2.0, 3.0])) == pytest.approx(1 / 8)
    assert sign_flip(np.array([-1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip(np.zeros(5)) == 1.0


@pytest.mark.parametrize("size", [13, 40])
def test_chance_stays_below_the_level_that_is_asked_for(size: int) -> None:
    """With counted and drawn signs, 5% of null examinations fall below 0.05, within three standard errors."""
    rng = np.random.default_rng(0)
    count = 60 if size > 14 else 2000
    below = np.mean([sign_flip(rng.normal(size=size)) <= 0.05 for _ in range(count)])
    assert below <= 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5


def test_the_rate_of_false_alarms_is_shared_out_completely() -> None:
    """Alternatives by Holm's rule and single comparisons by Bonferroni's together reach FALSE_ALARM, and no more."""
    assert pytest.approx(FALSE_ALARM) == ALTERNATIVES + SINGLES * LEVEL


def test_holm_s_rule_on_a_hand_counted_case() -> None:
    """At 0.05 over four, 0.01 <= 0.05 / 4 and 0.016 <= 0.05 / 3 pass; 0.03 > 0.05 / 2 fails, and what comes after."""
    assert significant([0.03, 0.01, 0.04, 0.016], level=0.05) == [False, True, False, True]


def test_the_commonest_faults_share_half_of_the_level() -> None:
    """At 0.008, two common alternatives have 0.002 each, forty-eight others 0.000083, until one of them passes."""
    weights = level_weights([True, True, *[False] * 48])
    assert weights.sum() == pytest.approx(1.0)
    others = [1.0] * 47
    assert significant([0.0015, 1.0, 0.0005, *others], weights) == [True, *[False] * 49]
    assert significant([1.0, 1.0, 0.00008, *others], weights)[2]
    assert level_weights([False] * 4).tolist() == [0.25] * 4


def healthy(rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Differences of KINDS alternatives of a sound speculator, per answer and place.

    Whether an alternative helps depends on the answer, by chance: places of an answer are correlated. Some alternatives
    are like others (shifts of the same input), and half of them are far worse.
    """
    taste = rng.normal(size=(KINDS // 5, ANSWERS)).repeat(5, axis=0) + rng.normal(size=(KINDS, ANSWERS))
    rate = 0.06 * np.tanh(taste) - 0.2 * (np.arange(KINDS) % 2)[:, None]
    return [
        [rng.binomial(1, 0.25 + p / 2, PLACES) - rng.binomial(1, 0.25 - p / 2, PLACES) for p in row] for row in rate
    ]


def test_healthy_speculators_raise_no_more_false_alarms_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 120 sound speculators, each with 50 alternatives on correlated places, at most 1% fail, within chance."""
    # Fewer signs are faster; they still resolve p values well below 0.008 / 50.
    monkeypatch.setattr(paired, "DRAWS", 20_000)
    rng, count = np.random.default_rng(7), 120
    alarms, naive = 0, 0
    for _ in range(count):
        chances = [chance(differences) for differences in healthy(rng)]
        alarms += any(significant(chances))
        naive += min(chances) <= FALSE_ALARM
    assert alarms / count <= FALSE_ALARM + 3 * (FALSE_ALARM * (1 - FALSE_ALARM) / count) ** 0.5
    # Each alternative by itself at 1% would have condemned many of them.
    assert naive / count > 0.1


def test_a_small_certain_gain_is_significant_among_all_alternatives() -> None:
    """3% more accepted drafts on 48 answers of 100 places count among fifty alternatives, with an interval."""
    rng = np.random.default_rng(3)
    base = [(rng.random((100, 1)) < 0.5).astype(float) for _ in range(48)]
    more = [np.where(rng.random((100, 1)) < 0.03, 1.0, table) for table in base]
    compared = compare(trial(*base), trial(*more))
    assert significant([compared.p, *[0.5] * 49])[0]
    assert abs(compared.share - 0.03) < compared.half_width < 0.02
    assert compared.size.startswith(f"accepted drafts {compared.share:+.1%} (95%: +")


def test_ranks_are_counted_among_the_tokens_that_can_be_drafted() -> None:
    """Draft ids 0, 1, 2 are tokens 9, 4, 7: token 4 is second, 9 and 7 share the ranks 2 and 3, 5 cannot be drafted."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 1.0], [1.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    ranks = reciprocal_ranks(logits, torch.tensor([4, 9, 7, 5]), torch.tensor([9, 4, 7]))
    assert ranks.tolist() == pytest.approx([1 / 2, 1 / 2.5, 1 / 2.5, 0.0])


def test_better_ranks_are_evidence_where_few_drafts_change() -> None:
    """24 answers gain one draft in 3 of them, which chance often gives; all of them gain in rank."""
    rng = np.random.default_rng(4)
    right = [np.zeros((40, 1)) for _ in range(24)]
    more = [table.copy() for table in right]
    for table in more[:3]:
        table[0] = 1.0
    ranks = tuple(rng.random(40) / 2 for _ in right)
    before, after = (attrs.evolve(trial(*tables), ranks=ranks) for tables in (right, more))
    assert compare(before, attrs.evolve(after, ranks=())).p > 0.1
    assert compare(before, trial(*more)).p > 0.1
    raised = tuple(one + 0.01 + 0.01 * rng.random(40) for one in ranks)
    assert compare(before, attrs.evolve(after, ranks=raised)).p < 1e-4


def test_later_drafts_count_beside_the_rank_of_the_first() -> None:
    """Two of three accepted drafts with the first at rank 1 are 2; a miss at rank 4 is 0.25, whatever comes later."""
    one = attrs.evolve(trial(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])), ranks=(np.array([1.0, 0.25]),))
    assert one.scores[0].tolist() == [2.0, 0.25]


def test_equal_drafts_are_never_better() -> None:
    """Two drafts of equal quality raise no alarm in a hundred pairs, in either direction."""
    rng = np.random.default_rng(1)
    pairs = [compare(drafts(rng, 0.5, 13), drafts(rng, 0.5, 13)) for _ in range(100)]
    assert not any(pair.better or pair.worse for pair in pairs)


def test_much_better_and_much_worse_are_seen_on_few_answers() -> None:
    """0.5 against 0.3 counts on three answers, in both directions."""
    rng = np.random.default_rng(2)
    low, high = drafts(rng, 0.3, 3, 200), drafts(rng, 0.5, 3, 200)
    assert compare(low, high).better
    assert compare(high, low).worse


def test_few_answers_must_agree() -> None:
    """One of four answers speaks for a change and three speak against it: their many places do not outvote them."""
    gains = [np.ones(200), *[-0.1 * np.ones(200)] * 3]
    assert sum(part.sum() for part in gains) > 0
    assert chance(gains) > 0.05
    assert chance([np.ones(200), *[0.1 * np.ones(200)] * 3]) <= LEVEL
