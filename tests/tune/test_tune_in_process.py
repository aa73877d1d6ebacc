"""Tuning in process: costs of rounds, predictions with intervals, and their order against real decoding."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from speculators.bench.replay import Replayed
from speculators.bench.responses import respond
from speculators.bench.suites import load_suite
from speculators.drafter import Proposal, chain
from speculators.errors import DataError
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.structure.converter import structure
from speculators.tune.costs import RoundTimes
from speculators.tune.predict import most_promising, predict
from speculators.tune.result import TuneResult
from speculators.tune.run import tune_in_process
from speculators.verifier.engine import Engine

WORDS = ("the other thing", "on and on", "is it", "reading")
K_MAX = 3


class ThreadClock:
    """Counts this thread's own time, which a busy machine does not stretch, and what drafts are said to cost."""

    def __init__(self) -> None:
        # Continues the real clock, which a decode may have read before.
        self.spent = time.perf_counter() - time.thread_time()

    def __call__(self) -> float:
        return time.thread_time() + self.spent


CLOCK = ThreadClock()


class Metered:
    """A drafter of known quality and cost: always right or always wrong, and its rounds cost what they are said to.

    Args:
        right: whether it drafts the verifier's own answers.
        answers: the verifier's answers; the tokens of each, prompt included.
        round_seconds, token_seconds: time it takes for a round, and for each token of it.
    """

    target_layer_ids = ()

    def __init__(self, right: bool, answers: list[tuple[int, ...]], *, round_seconds=0.0, token_seconds=0.0) -> None:
        self.right, self.answers = right, answers
        self.round_seconds, self.token_seconds = round_seconds, token_seconds
        self.draft_to_target = torch.arange(320)

    def draft(self) -> Metered:
        return self

    def replay(self, *, input_ids: torch.Tensor, num_speculative_tokens: int, **_: Any) -> Iterator[torch.Tensor]:
        for depth in range(1, num_speculative_tokens + 1):
            after = input_ids[0].roll(-1 - depth) + (0 if self.right else 1)
            yield torch.nn.functional.one_hot(after % 320, 320).float()

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> dict[str, Any]:
        prompt = tuple(tokens.tolist())
        (answer,) = {each for each in self.answers if each[: len(prompt)] == prompt}
        return {"answer": answer, "length": len(prompt)}

    def propose(self, state: Any, *, num_tokens: int, **_: Any) -> Proposal:
        CLOCK.spent += self.round_seconds + num_tokens * self.token_seconds
        after = torch.zeros(num_tokens, dtype=torch.int64)
        known = torch.tensor(state["answer"][state["length"] :][:num_tokens], dtype=torch.int64)
        after[: len(known)] = known
        return chain((after + (0 if self.right else 1)) % 320)

    def advance(self, state: Any, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        state["length"] += len(tokens)


@pytest.fixture(scope="module")
def engine(tiny_verifier):
    """The tiny verifier in float32."""
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """Four prompts with answers of 32 tokens."""
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    rows = [{"question_id": index, "category": "", "turns": [text]} for index, text in enumerate(WORDS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return BenchmarkSection(
        suites=(Suite(name="mine", path=str(path)),), num_speculative_tokens=(K_MAX,), max_new_tokens=32
    )


@pytest.fixture(scope="module")
def answers(engine, section):
    """The verifier's answers to them, prompts included."""
    responses = respond(engine, load_suite(section.suites[0]), temperature=0.0, max_new_tokens=32)
    return [response.tokens for response in responses]


@pytest.mark.parametrize(
    ("right", "cost", "order"),
    [(False, {"token_seconds": 0.003}, [1, 2, 3]), (True, {"round_seconds": 0.006}, [3, 2, 1])],
)
def test_the_predicted_order_is_the_measured_one(engine, section, answers, right, cost, order, monkeypatch):
    """Where each token costs time and none is accepted, short drafts win; where rounds cost time and all are accepted,
    long ones do. A round costs 3 ms more than another, several steps of the verifier."""
    monkeypatch.setattr(time, "perf_counter", CLOCK)
    drafter = Metered(right, answers, **cost)
    result = tune_in_process(drafter, engine, section, name="toy", k_max=K_MAX, measured=K_MAX, cycles=10)
    predicted = sorted(result.candidates, key=lambda each: -each.predicted)
    measured = sorted(result.candidates, key=lambda each: -each.measured.speed_up)
    assert [each.num_speculative_tokens for each in predicted] == order
    assert [each.num_speculative_tokens for each in measured] == order
    assert [each.tau for each in predicted][-1] == pytest.approx(1.0 if not right else 31 / 16, abs=0.1)
    reread, problems = structure(json.loads(json.dumps(result.to_json())), TuneResult)
    assert (reread, problems) == (result, [])


def test_responses_without_enough_rounds_are_an_error(engine, section, answers):
    """A median of two rounds is no cost."""
    short = attrs.evolve(section, max_new_tokens=4, num_speculative_tokens=(1,))
    with pytest.raises(DataError, match="are needed to time each K"):
        tune_in_process(Metered(False, answers), engine, short, name="toy", k_max=K_MAX)


def times(seconds: list[list[float]], drafted: list[list[int]]) -> RoundTimes:
    """Makes times without drafting, so that `seconds` are the rounds'."""
    table = np.array(seconds)
    return RoundTimes(draft=np.zeros_like(table), verify=table, drafted=np.array(drafted))


def test_costs_are_ratios_of_medians_and_outliers_do_not_move_them():
    """A round that another process held up for seconds counts as one round."""
    typical = times([[1.0, 1.5], [1.0, 1.5], [50.0, 1.5], [1.0, 70.0], [1.0, 1.5]], [[0, 1]] * 5)
    assert typical.costs().tolist() == [1.0, 1.5]
    assert typical.noise == 0.0


def test_a_drafter_that_stops_early_pays_for_the_lengths_it_drafts():
    """Three rounds of one token at 2 and one of three tokens at 6 cost 3 on average; their median would be 2."""
    early = times([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 6.0]], [[0, 1], [0, 1], [0, 1], [0, 3]])
    assert early.costs().tolist() == [1.0, 3.0]


def _replayed(rates: list[list[float]]) -> Replayed:
    """Makes the replay of prompts whose drafts are accepted with these probabilities at each depth."""
    return Replayed(
        acceptance=tuple(np.tile(np.array(row), (40, 1)) for row in rates),
        ids=tuple(str(index) for index in range(len(rates))),
        prompt_lengths=(10,) * len(rates),
        categories=("",) * len(rates),
        cut_prompts=0,
        cut_tokens=0,
    )


def test_intervals_come_from_prompts_and_from_rounds():
    """Without spread in either there is none; spread of one widens it. The exact value lies inside."""
    steady = times([[1.0, 1.2, 1.4]] * 8, [[0, 1, 2]] * 8)
    noise = np.random.default_rng(0).normal(1.0, 0.1, 8)
    same = _replayed([[0.5, 0.4]] * 6)
    point = predict({1: same, 2: same}, steady)[0]
    assert point.predicted_interval == pytest.approx((point.predicted, point.predicted))
    varied = _replayed([[rate, 0.4] for rate in (0.2, 0.3, 0.5, 0.6, 0.7, 0.8)])
    over_prompts = predict({1: varied, 2: varied}, steady)[0]
    uneven = times([[plain, 1.2, 1.4] for plain in noise], [[0, 1, 2]] * 8)
    over_rounds = predict({1: same, 2: same}, uneven)[0]
    for each in (over_prompts, over_rounds):
        low, high = each.predicted_interval
        assert low < each.predicted < high


def test_what_all_k_share_does_not_blur_their_comparison():
    """Prompts differ widely and costs are equal, so that the longer draft is faster on every one: it always wins."""
    varied = _replayed([[rate, rate] for rate in (0.1, 0.3, 0.5, 0.7, 0.9)])
    first, second = predict({1: varied, 2: varied}, times([[1.0, 1.0, 1.0]] * 6, [[0, 1, 2]] * 6))
    assert first.predicted_interval[1] > second.predicted_interval[0]
    assert (first.chance_of_best, second.chance_of_best) == (0.0, 1.0)
    assert most_promising((first, second), 1) == [2]
