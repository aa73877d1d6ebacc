"""The on-policy measure has the verifier's exact numbers and separates its own answers from others."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from speculators.data.encoded import Encoded
from speculators.events import ProgressEvent
from speculators.inspection import on_policy as policy
from speculators.inspection.on_policy import measure_on_policy, score_tokens
from speculators.pipeline.context import Context
from speculators.pipeline.setup import make_context
from speculators.recipe.load import load_recipe
from speculators.runs.places import Places
from speculators.training.world import World
from speculators.verifier.weights import load_head

PROMPTS = [[1, 5 + 3 * k, 40 + k, 200 - 5 * k] for k in range(24)]


@attrs.frozen
class Answered:
    """What `measure_on_policy` reads of prepared conversations: prompts with answers, all of which is supervised."""

    answers: list[list[int]]
    turn_ends: tuple[int, ...] = (2,)

    def __len__(self) -> int:
        return len(self.answers)

    def row(self, index: int) -> Encoded:
        ids = np.array(PROMPTS[index] + self.answers[index], np.int32)
        return Encoded(ids, np.arange(len(ids)) >= len(PROMPTS[index]))

    def ids(self) -> list[str]:
        return [f"row{index}" for index in range(len(self))]


@pytest.fixture(scope="module")
def events() -> list:
    return []


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, events: list) -> Context:
    """The context of a run with the tiny verifier in float32."""
    home: Path = tmp_path_factory.mktemp("policy")
    return make_context(load_recipe("smoke"), Places(runs=home / "runs", cache=home / "cache"), World(), events.append)


@pytest.fixture(scope="module")
def greedy(context: Context) -> list[list[int]]:
    """The verifier's answers at temperature 0."""
    return context.engine("float32").generate(PROMPTS, max_new_tokens=48)


def test_numbers_are_those_of_the_models_own_logits(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores equal those from the model's own logits, whatever the size of the chunks."""
    monkeypatch.setattr(policy, "PLACES", 7)
    engine = context.engine("float32")
    ids = torch.tensor(PROMPTS[0] + list(range(20, 60)))
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[[1, 3, *range(10, 40)]] = True
    head = load_head(context.folder, context.plan.facts)
    got = score_tokens(head, engine.capture([ids], ())[0][1], ids, mask, ends=(21, 30))
    with torch.no_grad():
        logs = engine.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    places = mask.nonzero()[:, 0]
    torch.testing.assert_close(got.log_probability, logs[places - 1, ids[places]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.entropy, -(logs.exp() * logs).sum(-1)[places - 1], atol=1e-4, rtol=1e-4)
    assert got.agrees.tolist() == (logs.argmax(-1)[places - 1] == ids[places]).tolist()
    assert got.ends.tolist() == [int(ids[place]) in (21, 30) for place in places]


def test_the_verifiers_greedy_answers_are_on_policy(context: Context, greedy: list[list[int]]) -> None:
    """The verifier agrees with every token of its own greedy answers."""
    found = measure_on_policy(context, Answered(greedy), 24)
    assert (found.agreement, found.verdict) == (1.0, "greedy")
    assert found.excess < 0


def test_the_verifiers_samples_are_on_policy_at_their_temperature(context: Context) -> None:
    """Samples surprise the verifier by its entropy, within chance, though its greedy token is often another."""
    sampled = context.engine("float32").generate(PROMPTS, max_new_tokens=48, temperature=1.0, seed=1)
    found = measure_on_policy(context, Answered(sampled), 24)
    assert found.verdict == "sampled"
    assert found.agreement < 0.8
    assert abs(found.excess) < 0.15


def test_text_of_another_is_off_policy(context: Context) -> None:
    """Random tokens are foreign text, and the consequence says so."""
    rng = np.random.default_rng(0)
    found = measure_on_policy(context, Answered([rng.integers(3, 300, 40).tolist() for _ in PROMPTS]), 24)
    assert found.verdict == "foreign"
    assert "not the verifier's own text" in found.consequence


def test_an_answer_that_was_cut_shows_at_its_end(context: Context, greedy: list[list[int]]) -> None:
    """After greedy answers that are cut and given an end of turn, the verifier would have gone on."""
    cut = [[*answer[:20], 2] for answer in greedy if len(answer) > 24]
    found = measure_on_policy(context, Answered(cut), len(cut))
    assert found.ends >= len(cut)
    assert found.ends_agreement is not None
    assert found.ends_agreement < 0.5


def test_the_sample_is_spread_evenly_and_reports_progress(
    context: Context, events: list, greedy: list[list[int]]
) -> None:
    """The sample runs from the first conversation to the last, reports each, and never exceeds their number."""
    answered = Answered(greedy)
    before = len(events)
    found = measure_on_policy(context, answered, 3)
    assert [one.id for one in found.conversations] in (["row0", "row12", "row23"], ["row0", "row11", "row23"])
    done = [event.done for event in events[before:] if isinstance(event, ProgressEvent) and event.stage == "on-policy"]
    assert done == [1, 2, 3]
    assert sum(one.tokens for one in found.conversations) == found.tokens
    assert len(measure_on_policy(context, answered, 1000).conversations) == 24
