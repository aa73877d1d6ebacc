"""Prompt look-up drafts what followed the last occurrence of the longest suffix."""

from __future__ import annotations

import torch

from speculators.decoding.ngram import NgramDrafter


def _propose(tokens: list[int], num_tokens: int = 3, longest: int = 3, shortest: int = 1) -> list[int]:
    drafter = NgramDrafter(longest, shortest)
    state = drafter.begin(torch.tensor(tokens), torch.empty(len(tokens) - 1, 0))
    return drafter.propose(state, num_tokens=num_tokens, temperature=0.0, generator=None).tokens.tolist()


def test_it_drafts_what_followed_the_longest_suffix():
    """The longest suffix wins: (1, 2, 3) is matched before (3), although 3 also occurred later."""
    assert _propose([1, 2, 3, 4, 5, 3, 9, 1, 2, 3]) == [4, 5, 3]


def test_a_shorter_suffix_is_tried_where_no_longer_one_occurred():
    """Shorter suffixes are tried until one matches."""
    assert _propose([7, 8, 5, 7]) == [8, 5, 7]


def test_a_match_below_the_shortest_length_drafts_nothing():
    """(8, 5) occurred before and (7, 8, 5) did not: two tokens match, not three."""
    tokens = [7, 3, 8, 5, 9, 7, 8, 5]
    assert _propose(tokens, shortest=2) == [9, 7, 8]
    assert _propose(tokens, shortest=3) == []


def test_of_equal_matches_the_last_one_counts():
    """Of several matches the last one is followed: recent text is more likely to repeat."""
    assert _propose([1, 5, 1, 6, 1], num_tokens=1) == [6]


def test_nothing_is_drafted_without_a_match():
    """Without a match the proposal is empty, which makes the round plain decoding."""
    assert _propose([1, 2, 3, 4]) == []


def test_a_match_near_the_end_drafts_only_what_there_is():
    """A draft ends with the sequence's last token, which has no successor."""
    assert _propose([5, 5], num_tokens=3) == [5]


def test_advancing_is_the_same_as_beginning_with_all_tokens():
    """The state depends on the tokens, not on how rounds grouped them."""
    drafter = NgramDrafter()
    nothing = torch.empty(0, 0)
    whole = drafter.begin(torch.tensor([1, 2, 3, 1, 2, 4]), nothing)
    grown = drafter.begin(torch.tensor([1, 2]), nothing)
    drafter.advance(grown, torch.tensor([3, 1]), nothing)
    drafter.advance(grown, torch.tensor([2, 4]), nothing)
    assert (whole.tokens, whole.after) == (grown.tokens, grown.after)
