"""The audit of a server's rounds: which are as predicted, which by a near tie, and where the others part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speculators.bench.margins import Margins
from speculators.bench.rows import Response
from speculators.servers.audit import (
    AGREES,
    DIFFERS,
    NEAR_TIE,
    Prediction,
    audit_rounds,
    foreign_tokens,
    predicted_rounds,
)
from speculators.servers.rounds import ServedAnswer

NEVER = -np.inf
# In float32, margins within 0.001 are near ties.
TIE = 0.0005


def _prediction(*draft: tuple[float, ...], verifier: tuple[float, ...] = ()) -> Prediction:
    values = np.array(draft)
    own = np.array(verifier or (1.0,) * (len(draft) + 1))
    return Prediction(
        draft=Margins(values, np.full(values.shape, 10.0)),
        verifier=Margins(own, np.full(own.shape, 10.0)),
        dtype=torch.float32,
    )


def _answer(rounds, length, **changes) -> ServedAnswer:
    response = Response(id="p", category="", tokens=tuple(range(4 + length)), prompt_length=4)
    return ServedAnswer(suite="mine", response=response, turn=0, has_system=False, rounds=rounds, **changes)


@pytest.mark.parametrize(
    ("margins", "served", "verdict", "predicted", "depth", "gap"),
    [
        ((2.0, 1.0, -3.0), 2, AGREES, 2, 0, None),
        ((2.0, 1.0, -3.0), 1, DIFFERS, 2, 2, 1.0),
        ((2.0, 1.0, -3.0), 3, DIFFERS, 2, 3, 3.0),
        ((2.0, TIE, -3.0), 1, NEAR_TIE, 2, 2, TIE),
        ((2.0, -TIE, 3.0), 3, NEAR_TIE, 1, 2, TIE),
        # A near tie at depth 2 does not explain what comes behind it.
        ((2.0, -TIE, 3.0), 2, DIFFERS, 1, 3, 3.0),
        ((2.0, -TIE, -3.0), 3, DIFFERS, 1, 3, 3.0),
        ((NEVER, 1.0, 1.0), 1, DIFFERS, 0, 1, None),
    ],
)
def test_a_round_is_judged_by_every_draft_that_it_accepted_and_the_one_it_rejected(
    margins, served, verdict, predicted, depth, gap
):
    """The depth is the first that rounding does not explain, with the logits that would have to change there."""
    answer = _answer(((0, served),), 6)
    prediction = _prediction(margins, *((NEVER, NEVER, NEVER),) * 4, verifier=(9.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    (round_,) = audit_rounds([answer], [prediction], 3)
    assert (round_.verdict, round_.predicted, round_.served, round_.depth) == (verdict, predicted, served, depth)
    assert round_.draft_gap == gap
    # The answer's token `depth` places behind the anchor is the one that the draft there is judged by.
    assert round_.verifier_gap == (float(depth) if depth else None)


def test_rounds_start_where_the_servers_own_rounds_end():
    """A difference moves the server's later rounds, which are predicted from where they begin, not from where
    replay's own walk would have them."""
    prediction = _prediction((2.0, 2.0), (2.0, -1.0), (-1.0, -1.0), (2.0, NEVER), (NEVER, NEVER))
    rounds = audit_rounds([_answer(((0, 0), (1, 1), (3, 1)), 6)], [prediction], 2)
    assert [(each.number, each.anchor, each.predicted, each.verdict) for each in rounds] == [
        (0, 0, 2, DIFFERS),
        (1, 1, 1, AGREES),
        (2, 3, 1, AGREES),
    ]
    assert [each.position for each in rounds] == [5, 6, 8]


def test_a_last_round_that_its_chunk_leaves_open_is_not_compared():
    """Its chunk does not say whether its last token was drafted."""
    prediction = _prediction((2.0,), (2.0,))
    answer = _answer(((0, 0), (1, 0)), 3)
    assert len(audit_rounds([answer], [prediction], 1)) == 2
    assert len(audit_rounds([_answer(answer.rounds, 3, open_end=True)], [prediction], 1)) == 1


def test_tokens_that_the_verifier_would_not_choose_are_counted_beside_near_ties():
    """They show another verifier, or another precision, and are no fault of the draft."""
    prediction = _prediction((1.0,), (1.0,), (1.0,), verifier=(1.0, -TIE, -2.0, 0.0))
    assert foreign_tokens([prediction]) == (1, 1)


def test_predicted_rounds_are_those_of_replays_own_walk():
    """Five tokens after the first with 2, 0 and 1 accepted drafts are rounds at the anchors 0, 3 and 4."""
    prediction = _prediction((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (1.0, NEVER))
    assert predicted_rounds([prediction], 2) == 3
