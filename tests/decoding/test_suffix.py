"""Suffix decoding drafts the most frequent continuation, from this sequence or an earlier response."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from speculators.decoding.suffix import SuffixDrafter

NOTHING = torch.empty(0, 0)


def propose(drafter, state, num_tokens=4):
    return drafter.propose(state, num_tokens=num_tokens, temperature=0.0, generator=None).tokens.tolist()


def begun(tokens, **options):
    drafter = SuffixDrafter(**options)
    return drafter, drafter.begin(torch.tensor(tokens), NOTHING)


def test_the_more_frequent_continuation_is_drafted():
    """The most frequent successor wins: 6 followed 5 twice, 7 only once, although it came last."""
    drafter, state = begun([5, 6, 1, 5, 6, 2, 5, 7, 3, 5])
    assert propose(drafter, state, 1) == [6]


def test_of_equally_frequent_ones_the_last_is_drafted():
    """Of several matches the last one is followed: recent text is more likely to repeat."""
    drafter, state = begun([5, 6, 1, 5, 7, 3, 5])
    assert propose(drafter, state, 1) == [7]


def test_no_more_tokens_are_drafted_than_were_matched():
    """A match of n tokens drafts at most n."""
    assert propose(*begun([9, 1, 2, 3, 4, 9]), num_tokens=4) == [1]
    assert propose(*begun([7, 8, 9, 1, 2, 3, 4, 7, 8, 9]), num_tokens=4) == [1, 2, 3]


def test_an_improbable_token_ends_the_draft():
    """Improbable tokens are not drafted: of four tokens that followed (1, 2) once each, none reaches a half."""
    tokens = [1, 2, 10, 1, 2, 11, 1, 2, 12, 1, 2, 13, 1, 2]
    assert propose(*begun(tokens, min_probability=0.5)) == []
    assert propose(*begun(tokens, min_probability=0.2)) == [13, 1]


def test_nothing_is_drafted_without_a_match():
    """Without a match the proposal is empty, which makes the round plain decoding."""
    assert propose(*begun([1, 2, 3, 4])) == []


def test_a_finished_response_is_remembered_and_its_prompt_is_not():
    """The second sequence drafts from the first one's response, never from its prompt."""
    drafter, state = begun([1, 2, 3, 40])
    drafter.advance(state, torch.tensor([41, 42, 43]), NOTHING)
    later = drafter.begin(torch.tensor([8, 9, 40]), NOTHING)
    assert propose(drafter, later) == [41]
    asked = drafter.begin(torch.tensor([8, 9, 2]), NOTHING)
    assert propose(drafter, asked) == []


def test_no_match_reaches_from_one_response_into_the_next():
    """The separator between responses is never drafted, and no match crosses it."""
    drafter, state = begun([1, 50])
    later = drafter.begin(torch.tensor([2, 60]), NOTHING)
    last = drafter.begin(torch.tensor([3, 50]), NOTHING)
    assert state is not later
    assert propose(drafter, last) == []


def plain(tokens, longest, num_tokens, min_probability, shortest=1):
    """The definition: counts successors suffix by suffix over lists."""
    best, best_score = [], 0.0
    for matched in range(shortest, longest + 1):
        suffix = tokens[-matched:]
        if len(suffix) < matched:
            break
        starts = [i + matched for i in range(len(tokens) - matched) if tokens[i : i + matched] == suffix]
        drafted, score, total = [], 0.0, len(starts)
        places = starts
        for _ in range(min(num_tokens, matched)):
            places = [place for place in places if place < len(tokens)]
            counts = Counter(tokens[place] for place in places)
            if not counts or max(counts.values()) < min_probability * total:
                break
            often = [token for token, count in counts.items() if count == max(counts.values())]
            pick = max(often, key=lambda token: max(place for place in places if tokens[place] == token))
            drafted.append(pick)
            score += counts[pick] / total
            places = [place + 1 for place in places if tokens[place] == pick]
        if starts and score >= best_score:
            best, best_score = drafted, score
    return best


@pytest.mark.parametrize("shortest", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_plain_definition_on_random_text(seed, shortest):
    """Text over four tokens, where suffixes of every length occur often."""
    generator = random.Random(seed)
    tokens = [generator.randrange(4) for _ in range(120)]
    drafter, state = begun(tokens[:20], longest=8, shortest=shortest, min_probability=0.3)
    for end in range(20, 120):
        assert propose(drafter, state) == plain(tokens[:end], 8, 4, 0.3, shortest)
        drafter.advance(state, torch.tensor(tokens[end : end + 1]), NOTHING)
