"""What differing rounds have in common is named, and chance is not."""

from __future__ import annotations

import random
import re

import attrs
import pytest

from speculators.servers.audit import AGREES, DIFFERS, AuditedRound
from speculators.servers.patterns import DEPTH, INPUTS, POSITIONS, PREFILL, VOCABULARY, find_patterns

K = 3


def _rounds(differs, *, prompts=20, per_prompt=10, length=40) -> list[AuditedRound]:
    """Makes rounds that accept 0 to 3 drafts in turn; where `differs` says so, one fewer than predicted."""
    rounds = []
    for prompt in range(prompts):
        for number in range(per_prompt):
            predicted = (prompt + number) % (K + 1)
            each = AuditedRound(
                suite="mine",
                prompt=f"p{prompt}",
                turn=prompt % 2,
                has_system=prompt % 4 == 0,
                number=number,
                anchor=2 * number,
                position=10 + length * prompt + 2 * number,
                predicted=predicted,
                served=predicted,
                verdict=AGREES,
            )
            if predicted and differs(each):
                each = attrs.evolve(each, served=predicted - 1, verdict=DIFFERS, depth=predicted, draft_gap=1.0)
            rounds.append(each)
    return rounds


@pytest.mark.parametrize(
    ("differs", "what", "check"),
    [
        (lambda each: each.predicted == 3, "always depth 3: 50 of the 100 rounds that reach it differ", DEPTH),
        (lambda each: each.predicted == 1, "always depth 1: 50 of the 200 rounds that reach it differ", INPUTS),
        (lambda each: each.position > 410, "only after position 41[0-9]: 7[0-9] of", POSITIONS),
        (lambda each: each.number == 0, "only the first round of an answer: 15 of 20 such rounds differ", PREFILL),
        (lambda each: each.has_system, "only prompts with a system turn: 3[0-9] of 50 such", "the prompt's ids"),
        (lambda each: not each.has_system, "only prompts without a system turn: 11[0-9] of 150", "the prompt's ids"),
        (lambda each: each.turn > 0, "only later turns: 7[0-9] of 100 such", "prefix cache"),
        (lambda each: each.prompt == "p7", "only prompt p7 of mine: [78] of 10", "its ids"),
    ],
)
def test_what_all_differing_rounds_share_is_named(differs, what, check):
    """With its counts and what to look at; how many accept fewer stands last."""
    patterns = find_patterns(_rounds(differs), K)
    named = [pattern for pattern in patterns if re.search(what, pattern.what)]
    assert named, patterns
    assert check in named[0].check
    assert "accept fewer drafts than predicted, 0 more" in patterns[-1].what


def test_nothing_is_named_where_nothing_differs():
    """A server as predicted has no pattern."""
    assert find_patterns(_rounds(lambda each: False), K) == ()


def test_rounds_that_differ_anywhere_have_nothing_in_common():
    """They are said to be everywhere, at all depths; 200 seeds name a property by chance in at most 2."""
    named = 0
    for seed in range(200):
        draw = random.Random(seed)
        patterns = find_patterns(_rounds(lambda each, draw=draw: draw.random() < 0.2), K)
        named += not patterns[0].what.startswith("everywhere, at depths 1, 2, 3")
    assert named <= 2


def test_first_drafts_that_are_never_right_name_the_vocabulary():
    """Every draft is wrong, so no other property of the rounds tells anything."""
    rounds = [
        attrs.evolve(each, served=0, verdict=DIFFERS if each.predicted else AGREES, depth=min(1, each.predicted))
        for each in _rounds(lambda each: False)
    ]
    first, *rest = find_patterns(rounds, K)
    assert first.what == "first drafts are never right: 0 of the 150 first drafts that should be right are accepted"
    assert first.check == VOCABULARY
    assert len(rest) == 1


def test_differences_that_grow_with_the_position_name_the_rotary_embedding():
    """Two fifths of the early rounds with a draft differ, and all of the late ones."""
    draw = random.Random(0)
    rounds = _rounds(lambda each: draw.random() < (0.4 if each.position < 410 else 1.0))
    first = find_patterns(rounds, K)[0]
    assert first.what.startswith("more with the position: ")
    assert first.check == POSITIONS
