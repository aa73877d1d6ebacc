"""The draft vocabulary: the most frequent supervised tokens, and the ends of turns."""

from __future__ import annotations

import numpy as np
import pytest

from speculators.data.vocab import coverage, draft_vocabulary, rare_tokens
from speculators.errors import DataError

COUNTS = np.array([0, 5, 5, 9, 0, 1, 5])


def test_most_frequent_with_ties_to_smaller_ids():
    """The vocabulary has the D most frequent tokens, sorted by id; ties go to the smaller ids."""
    ids = draft_vocabulary(COUNTS, 3)
    assert ids.tolist() == [1, 2, 3]
    assert ids.dtype == np.int64


def test_end_of_turn_is_always_in():
    """A token that ends a turn replaces the least frequent one, and is reported as rare."""
    assert draft_vocabulary(COUNTS, 3, must_have=[4]).tolist() == [1, 3, 4]
    assert coverage(np.array([1, 3, 4]), COUNTS) == pytest.approx(0.56)
    assert rare_tokens(np.array([1, 3, 4]), COUNTS, [4]) == (4,)
    assert rare_tokens(np.array([1, 2, 3]), COUNTS, [3]) == ()


def test_whole_vocabulary_and_unseen_tokens():
    """D = V gives every token; tokens that are never supervised fill the rest from the smallest id."""
    assert draft_vocabulary(COUNTS, 7).tolist() == list(range(7))
    assert draft_vocabulary(COUNTS, 6).tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("size", "must_have", "said"),
    [
        (8, (), "draft_vocab_size is 8, but the verifier's vocabulary has 7 tokens"),
        (0, (), "draft_vocab_size is 0"),
        (1, (2, 3), "too small for the 2 tokens that end a turn"),
        (3, (7,), r"end-of-turn tokens \[7\] are not in a vocabulary of 7"),
        (3, (-1,), "are not in a vocabulary"),
    ],
)
def test_impossible_vocabulary_explains_itself(size, must_have, said):
    """A draft vocabulary larger than V, or too small for the ends of turns, raises one clear error."""
    with pytest.raises(DataError, match=said):
        draft_vocabulary(COUNTS, size, must_have)
