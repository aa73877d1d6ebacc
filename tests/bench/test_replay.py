"""Replay is what live decoding does: round for round at T = 0, within its interval at T > 0."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from toys import ToySpeculator, greedy_response, hidden_states_of, train_toy

from speculators.bench.counts import count_decoded
from speculators.bench.live import Contender, LiveSettings, run_live
from speculators.bench.referee import agree_by_round, agree_given_tokens
from speculators.bench.replay import replay, replay_deterministic
from speculators.bench.responses import capture_rows
from speculators.bench.rows import Response, judge
from speculators.bench.walk import greedy_rounds, walk
from speculators.decoding.ngram import NgramDrafter
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head

LAYERS = (1, 2, 4)
K_MAX = 5
LENGTH = 40
PROMPTS = [[1, 20, 45, 77, 31], [1, 9, 250], [1, *range(100, 130)], [1, 63, 62, 61, 60, 59, 58], [1, 5], [1, 210, 7, 8]]


@pytest.fixture(scope="module")
def engine(tiny_verifier):
    """The tiny verifier in float32."""
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def head(engine):
    """Its whole head."""
    return load_head(engine.folder, engine.facts)


@pytest.fixture(scope="module")
def responses(engine):
    """Greedy ones of several lengths, by full forwards."""
    found = []
    for index, prompt in enumerate(PROMPTS):
        answer = greedy_response(engine.model, prompt, length=LENGTH - 6 * index, stop_ids=engine.stop_ids)
        tokens = (*prompt, *answer)
        found.append(Response(id=str(index), category="ab"[index % 2], tokens=tokens, prompt_length=len(prompt)))
    return found


@pytest.fixture(scope="module")
def rows(engine, head, responses):
    """The responses, judged at T = 0."""
    return capture_rows(engine, head, responses, LAYERS, temperature=0.0)


@pytest.fixture(scope="module")
def trained(engine, responses):
    """Fitted to half of the responses; its vocabulary lacks some of their tokens and is not in order."""
    known = sorted({token for each in responses for token in each.answer})
    ids = torch.tensor([token for token in known if token % 7])[torch.randperm(sum(t % 7 > 0 for t in known))]
    toy = ToySpeculator(state_size=96, vocab_size=320, draft_to_target=ids, target_layer_ids=LAYERS)
    train_toy(toy, engine.model, [each.tokens for each in responses[::2]], steps=100)
    return toy


def _speculator(kind, trained):
    if kind == "random":
        return ToySpeculator(state_size=96, vocab_size=320, target_layer_ids=LAYERS, seed=4)
    if kind == "adversarial":
        toy = ToySpeculator(state_size=96, vocab_size=320, draft_to_target=trained.draft_to_target)
        toy.load_state_dict(trained.state_dict())
        toy.target_layer_ids, toy.sign = LAYERS, -1.0
        return toy
    return trained


def _never(row, place, token):
    return False


@pytest.mark.parametrize("kind", ["trained", "random", "adversarial"])
def test_at_zero_temperature_replay_and_live_agree_round_for_round(kind, engine, rows, trained):
    """For every K from 1 to 5, out of one replay: the same anchors, the same drafts accepted, the same tau."""
    model = _speculator(kind, trained)
    replayed = replay(model, rows, k_max=K_MAX, temperature=0.0)
    contenders = [Contender(f"K={k}", model.draft, k) for k in range(1, K_MAX + 1)]
    settings = LiveSettings(temperature=0.0, max_new_tokens=LENGTH, stop_ids=frozenset(engine.stop_ids))
    live = run_live(engine.model, contenders, rows, settings)
    for k in range(1, K_MAX + 1):
        decoded = live[f"K={k}"]
        for row, each, table in zip(rows, decoded, replayed.acceptance, strict=True):
            assert each.tokens == row.response.answer
            assert [(r.anchor, r.accepted) for r in each.rounds] == greedy_rounds(table, k)
        predicted, measured = replayed.counts(k), count_decoded(decoded, k)
        assert agree_by_round(rows, decoded, replayed.acceptance, predicted=predicted, near_tie=_never).agrees
        for field in attrs.fields(type(predicted)):
            np.testing.assert_array_equal(getattr(predicted, field.name), getattr(measured, field.name))
    assert kind != "trained" or replayed.counts(K_MAX).tau > 1.5


def test_an_off_by_one_in_replay_is_a_gap(engine, rows, trained):
    """The referee must be able to fail: shift the tables by one anchor and it names prompt and round."""
    settings = LiveSettings(temperature=0.0, max_new_tokens=LENGTH, stop_ids=frozenset(engine.stop_ids))
    live = run_live(engine.model, [Contender("K=3", trained.draft, 3)], rows, settings)["K=3"]
    replayed = replay(trained, rows, k_max=3, temperature=0.0)
    shifted = [np.roll(table, 1, axis=0) for table in replayed.acceptance]
    outcome = agree_by_round(rows, live, shifted, predicted=walk(shifted, 3), near_tie=_never)
    assert not outcome.agrees
    assert "prompt 0, round" in outcome.gap


def test_live_output_that_is_not_the_verifiers_is_a_gap_unless_rounding_explains_it(engine, rows, trained):
    """One other token is reported as lost losslessness; at a near tie what comes before is compared and counted."""
    settings = LiveSettings(temperature=0.0, max_new_tokens=LENGTH, stop_ids=frozenset(engine.stop_ids))
    live = run_live(engine.model, [Contender("K=3", trained.draft, 3)], rows, settings)["K=3"]
    wrong = list(live[0].tokens)
    wrong[20] = (wrong[20] + 1) % 320
    changed = [attrs.evolve(live[0], tokens=tuple(wrong)), *live[1:]]
    replayed = replay(trained, rows, k_max=3, temperature=0.0)
    options = {"predicted": replayed.counts(3)}
    outcome = agree_by_round(rows, changed, replayed.acceptance, near_tie=_never, **options)
    assert "differs from the verifier's own output at token 20" in outcome.gap
    outcome = agree_by_round(rows, changed, replayed.acceptance, near_tie=lambda *_: True, **options)
    assert (outcome.agrees, outcome.near_ties) == (True, 1)


def test_packing_does_not_change_the_numbers(rows, trained):
    """Responses in one row do not see each other: one row each, or all in one, give the same tables."""
    apart = replay(trained, rows, k_max=K_MAX, temperature=0.0, row_tokens=1)
    together = replay(trained, rows, k_max=K_MAX, temperature=0.0, row_tokens=10_000)
    for one, other in zip(apart.acceptance, together.acceptance, strict=True):
        np.testing.assert_array_equal(one, other)


def _teacher(engine, rows, temperature, k_max, model):
    """The acceptance tables again, one entry at a time, from full softmaxes over the verifier's vocabulary."""
    tables = []
    for row in rows:
        tokens, start = row.response.tokens, row.response.prompt_length
        left = len(tokens) - start - 1
        states, _ = hidden_states_of(engine.model, tokens, LAYERS)
        with torch.no_grad():
            p = torch.softmax(engine.model(torch.tensor([tokens])).logits[0] / temperature, dim=-1)
        table = np.zeros((left, k_max))
        for anchor in range(left):
            known = start + anchor + 1
            for depth in range(1, min(k_max, left - anchor) + 1):
                drafter = model.draft()
                state = drafter.begin(torch.tensor(tokens[:known]), states[: known - 1])
                g = torch.tanh(model.read(state["carry"]) + model.embed(state["token"]))
                for token in tokens[known : known + depth - 1]:
                    g = torch.tanh(model.back(g) + model.embed(torch.tensor(token)))
                q = torch.zeros(320).index_put_(
                    (model.draft_to_target,), torch.softmax(model.logits(g) / temperature, -1)
                )
                place = known + depth - 1
                y = tokens[place]
                table[anchor, depth - 1] = min(1.0, float(q[y] / p[place - 1, y]))
        tables.append(table)
    return tables


@torch.no_grad()
def test_sampled_acceptance_is_the_ratio_of_the_two_probabilities(engine, head, responses, trained):
    """min(1, q(y) / p(y)) with p over the whole vocabulary and q = 0 outside the draft's; 1e-4 is float32 rounding."""
    some = [attrs.evolve(each, tokens=each.tokens[: each.prompt_length + 9]) for each in responses[:2]]
    rows = capture_rows(engine, head, some, LAYERS, temperature=0.7)
    replayed = replay(trained, rows, k_max=3, temperature=0.7)
    for found, wanted in zip(replayed.acceptance, _teacher(engine, rows, 0.7, 3, trained), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert any((table == 0).any() and (table > 0.5).any() for table in replayed.acceptance)


@pytest.fixture(scope="module")
def sampled(engine, rows, trained):
    """Live responses at T = 1, several for each prompt."""
    settings = LiveSettings(temperature=1.0, max_new_tokens=32, stop_ids=frozenset(engine.stop_ids), seed=3)
    contenders = [Contender(f"K={k}", trained.draft, k) for k in (1, 4)]
    return run_live(engine.model, contenders, rows * 3, settings)


@pytest.mark.parametrize("k", [1, 4])
def test_at_temperature_one_replay_lies_in_lives_interval(k, engine, head, rows, trained, sampled):
    """Replay of what live emitted predicts its rounds within 99%; seeded."""
    decoded = sampled[f"K={k}"]
    emitted = [
        attrs.evolve(row.response, tokens=(*row.response.prompt, *each.tokens))
        for row, each in zip(rows * 3, decoded, strict=True)
    ]
    own = capture_rows(engine, head, emitted, LAYERS, temperature=1.0)
    replayed = replay(trained, own, k_max=k, temperature=1.0)
    predicted, measured = replayed.counts(k), count_decoded(decoded, k)
    outcome = agree_given_tokens(measured, replayed.acceptance, predicted=predicted, level=0.99)
    assert outcome.agrees, outcome.gap
    low, high = outcome.interval
    assert low < measured.tau < high
    assert 1.02 < low < high < 1.1 * low, "the interval must be narrow enough to say something"


def test_a_greedy_replay_of_a_sampled_decode_is_a_gap(engine, head, rows, trained, sampled):
    """Drafts taken for greedy ones (SpecForge PR#741) give another tau, and the referee sees it."""
    decoded = sampled["K=4"]
    emitted = [
        attrs.evolve(row.response, tokens=(*row.response.prompt, *each.tokens))
        for row, each in zip(rows * 3, decoded, strict=True)
    ]
    own = capture_rows(engine, head, emitted, LAYERS, temperature=1.0)
    wrong = replay(trained, own, k_max=4, temperature=0.0)
    measured = count_decoded(decoded, 4)
    assert not agree_given_tokens(measured, wrong.acceptance, predicted=wrong.counts(4), level=0.99).agrees


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_deterministic_drafter_is_replayed_without_the_verifier(temperature, engine, rows):
    """n-gram acceptance read off the tokens equals the live decode's: exactly at T = 0, in the interval at T = 1."""
    settings = LiveSettings(temperature=temperature, max_new_tokens=LENGTH, stop_ids=frozenset(engine.stop_ids))
    decoded = run_live(engine.model, [Contender("ngram", NgramDrafter, 3)], rows, settings)["ngram"]
    emitted = [
        attrs.evolve(row, response=attrs.evolve(row.response, tokens=(*row.response.prompt, *each.tokens)))
        for row, each in zip(rows, decoded, strict=True)
    ]
    replayed = replay_deterministic(NgramDrafter, emitted, k_max=3)
    # Given the tokens a point mass is accepted or not without any chance, so even at T = 1 rounds are the same.
    for table, each in zip(replayed.acceptance, decoded, strict=True):
        assert [(r.anchor, r.accepted) for r in each.rounds] == greedy_rounds(table, 3)


def test_a_response_is_cut_where_it_leaves_the_verifiers_output(engine, head, responses):
    """A prefix of a greedy output is a greedy output: what comes before the first foreign token stays, and the cut is
    counted; a response that is foreign from the start has nothing left and breaks nothing."""
    good = responses[0]
    foreign = list(good.tokens)
    foreign[good.prompt_length + 11] = (foreign[good.prompt_length + 11] + 1) % 320
    at_once = list(good.tokens)
    at_once[good.prompt_length] = (at_once[good.prompt_length] + 1) % 320
    three = [good, attrs.evolve(good, tokens=tuple(foreign)), attrs.evolve(good, tokens=tuple(at_once))]
    rows = capture_rows(engine, head, three, LAYERS, temperature=0.0)
    assert [len(row.response.answer) for row in rows] == [len(good.answer), 11, 0]
    toy = ToySpeculator(state_size=96, vocab_size=320, target_layer_ids=LAYERS)
    replayed = replay(toy, rows, k_max=2, temperature=0.0)
    assert (replayed.cut_prompts, replayed.cut_tokens) == (2, 2 * len(good.answer) - 11)
    assert [len(table) for table in replayed.acceptance] == [len(good.answer) - 1, 10, 0]
    np.testing.assert_array_equal(replayed.acceptance[1][:8], replayed.acceptance[0][:8])


def test_judging_in_chunks_is_judging_at_once(engine, head, responses, monkeypatch):
    """Logits of a long response are never all in memory."""
    states, last = hidden_states_of(engine.model, responses[0].tokens, LAYERS)
    whole = judge(head, responses[0], states, last, temperature=0.6)
    monkeypatch.setattr("speculators.bench.rows.CHUNK_ENTRIES", 320 * 5)
    chunked = judge(head, responses[0], states, last, temperature=0.6)
    torch.testing.assert_close(whole.log_p, chunked.log_p)
    assert judge(head, responses[0], states, last, temperature=0.0).cut == 0
    with torch.no_grad():
        logits = engine.model(torch.tensor([responses[0].tokens])).logits[0] / 0.6
    start = responses[0].prompt_length
    wanted = torch.log_softmax(logits[start - 1 : -1], -1).gather(-1, torch.tensor(responses[0].answer)[:, None])[:, 0]
    torch.testing.assert_close(whole.log_p, wanted, rtol=1e-4, atol=1e-4)
