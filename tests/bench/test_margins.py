"""Margins: by how much an emitted token is preferred, by the draft and by the verifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import ToySpeculator

from speculators.bench.margins import Margins, describe_rounding, margins, verifier_margins
from speculators.bench.replay import replay, replay_margins
from speculators.bench.responses import capture_rows
from speculators.bench.rows import Response, shortened
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head

LAYERS = (1, 2, 4)
PROMPTS = [[1, 20, 45, 77, 31], [1, 9, 250], [1, 63, 62, 61, 60]]


@pytest.fixture(scope="module")
def rows(tiny_verifier):
    """Greedy responses of the tiny verifier, with their states."""
    engine = Engine(tiny_verifier)
    answers = engine.generate(PROMPTS, max_new_tokens=12)
    responses = [
        Response(id=str(index), category="", tokens=(*prompt, *answer), prompt_length=len(prompt))
        for index, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    return capture_rows(engine, load_head(engine.folder, engine.facts), responses, LAYERS, temperature=0.0)


def test_a_margin_is_the_logit_less_the_largest_other():
    """Above 0 for the choice, below for any other token, and -inf for one that has no logit."""
    logits = torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [-8.0, 4.0, 2.5]])
    judged = margins(logits, torch.tensor([1, 2, -1]))
    assert judged.tolist() == [[1.5, 4.0], [-1.5, 4.0], [-float("inf"), 8.0]]


def test_drafts_with_a_margin_above_0_are_those_that_replay_accepts(rows):
    """Also with a draft vocabulary that lacks some of the tokens, and past the end of a response."""
    known = sorted({token for row in rows for token in row.response.answer})
    ids = torch.tensor([token for token in [*known, *range(100, 140)] if token % 5])
    toy = ToySpeculator(state_size=96, vocab_size=320, draft_to_target=ids.unique(), target_layer_ids=LAYERS)
    tables = replay(toy, rows, k_max=3, temperature=0.0).acceptance
    by_answer = replay_margins(toy, rows, k_max=3)
    for each, table in zip(by_answer, tables, strict=True):
        np.testing.assert_array_equal(each.values >= 0, table > 0)
        assert np.isneginf(each.values[-1, 1:]).all()
    assert any(np.isneginf(each.values[:-2]).any() for each in by_answer)


def test_answers_shorter_than_a_draft_have_margins_of_their_own_length(rows):
    """An answer of one token has no round, and one of two a round with a single judged draft."""
    toy = ToySpeculator(state_size=96, vocab_size=320, target_layer_ids=LAYERS)
    by_answer = replay_margins(toy, [shortened(rows[0], 1), shortened(rows[1], 2)], k_max=3)
    assert [each.values.shape for each in by_answer] == [(0, 3), (1, 3)]
    assert np.isfinite(by_answer[1].values).tolist() == [[True, False, False]]


def test_the_verifier_prefers_each_token_of_its_own_answer(rows, tiny_verifier):
    """Its margins are above 0 there, and below for the token that replaces one."""
    engine = Engine(tiny_verifier)
    head = load_head(engine.folder, engine.facts)
    tokens = list(rows[0].response.tokens)
    tokens[-1] = (tokens[-1] + 1) % 320
    other = Response(id="0", category="", tokens=tuple(tokens), prompt_length=rows[0].response.prompt_length)
    ((_, _, last),) = engine.capture_all([torch.tensor(tokens)], LAYERS)
    own = verifier_margins(head, other, last)
    assert (own.values[:-1] > 0).all()
    assert own.values[-1] < 0


@pytest.mark.parametrize(
    ("dtype", "rounding", "text"),
    [
        (torch.float32, [0.001, 0.001], "0.001 logits (float32)"),
        (torch.bfloat16, [0.6, 1.2], "6% of the largest logit (bfloat16)"),
    ],
)
def test_rounding_is_that_of_the_dtype(dtype, rounding, text):
    """In 16 bits it grows with the logits."""
    pair = Margins(np.array([1.0, 2.0]), np.array([10.0, 20.0]))
    np.testing.assert_allclose(pair.rounding(dtype), rounding)
    assert describe_rounding(dtype) == text
