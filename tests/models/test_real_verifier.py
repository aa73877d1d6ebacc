"""SmolLM2-135M-Instruct from its wheel, with a trained, a random and an adversarial speculator; slow."""

from __future__ import annotations

import pytest
import torch
from command import events
from kept import kept_run

from speculators.bench.responses import own_rows
from speculators.bench.result import taus
from speculators.bench.suites import load_suite
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.recipe.expect import band_lines, compare_bands
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Suite
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain
from speculators.verifier.weights import load_head

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def run():
    """A run of the recipe `quickstart_short`, benchmark included."""
    return kept_run("quickstart_short")


def test_a_short_run_learns_and_live_agrees_with_replay(run):
    """The loss falls, more is accepted than by chance, and live agrees with replay at T = 0 and at T = 1."""
    losses = [event["loss"] for event in events(run.folder, "StepEvent")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert run.bench.agrees
    settings = {(s.temperature, s.num_speculative_tokens): s for s in run.bench.settings}
    assert settings[0.0, 3].exact.tau > 1.1
    assert settings[0.0, 3].live.agreement.criterion == "round for round"


def test_a_run_reaches_the_band_that_its_recipe_tells(run):
    """Each acceptance length lies inside its band of `[expect]`, which was measured with three seeds."""
    held = compare_bands(load_recipe("quickstart_short").expect, taus(run.bench.settings))
    assert [row.place for row in held] == ["inside"] * 4, band_lines(held)


@pytest.mark.parametrize("kind", ["trained", "random", "adversarial"])
def test_greedy_output_is_the_verifiers_own(run, kind):
    """In float32 the speculative output is the verifier's own greedy output, token for token, with any drafter."""
    folder = obtain(load_recipe("quickstart_short").verifier)
    model = SpeculatorModel.from_pretrained(run.folder / "speculator")
    if kind == "random":
        torch.manual_seed(0)
        model.fc.weight.data.normal_(std=0.05)
    elif kind == "adversarial":
        # Drafts what the trained one finds least likely.
        model.lm_head.weight.data.neg_()
    engine = Engine(folder, dtype="float32")
    prompts = load_suite(Suite(name="quickstart", take=4))
    head = load_head(folder, engine.facts)
    ids = model.draft().target_layer_ids
    rows = own_rows(engine, head, prompts, ids, temperature=0.0, max_new_tokens=32)
    for row in rows:
        live = decode(
            CachedVerifier(engine.model, ids),
            model.draft(),
            torch.tensor(row.response.prompt),
            max_new_tokens=len(row.response.answer),
            num_tokens=4,
            temperature=0.0,
            generator=None,
            stop_ids=frozenset(engine.stop_ids),
        )
        assert tuple(live.tokens) == row.response.answer
        if kind == "adversarial":
            assert sum(each.accepted for each in live.rounds) == 0
