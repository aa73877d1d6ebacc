"""Proves of every registered algorithm that it trains, replays and decodes exactly; new ones are included."""

from __future__ import annotations

import attrs
import pytest
import torch

from speculators.bench.counts import count_decoded
from speculators.config import CONFIGS, SpeculatorModelConfig

from .proof import (
    K,
    accepted_share,
    check_documents_are_apart,
    check_empty_row,
    check_packed_conversations,
    check_replay_equals_live,
    check_sampling_is_exact,
    check_saved_is_the_same,
    fit,
    row_of,
    scramble,
    world_of_three_tokens,
)

ALGORITHMS = CONFIGS.names()

# Small ones, with as many depths as are drafted here; the objectives are the shipped ones.
SMALL: dict[str, dict] = {
    "eagle1": {"alignment_steps": 3},
    "peagle": {"num_depths": 4},
    "dflash": {"num_layers": 2, "block_size": 5},
    "dspark": {"num_layers": 2, "block_size": 4, "markov_rank": 16},
}

# How long one batch takes to be learnt by heart where it is longer than usual: noise, distributions, drawn depths.
FIT: dict[str, dict] = {
    "eagle1": {"steps": 200},
    "eagle3": {"steps": 300},
    "peagle": {"steps": 800, "lr": 5e-3},
}

# Nothing drawn at random, which a document by itself would draw in another way than beside others.
UNDRAWN: dict[str, dict] = {"eagle1": {"noise": 0.0}, "peagle": {"keep": 1.0}}

# Algorithms that draft from the verifier's whole vocabulary only.
WHOLE_VOCABULARY = {"mtp"}


def config_of(name: str, **options) -> SpeculatorModelConfig:
    return SpeculatorModelConfig.get_class(name)(**{**SMALL.get(name, {}), **options})


def reduced(name: str, size: int) -> int | None:
    return None if name in WHOLE_VOCABULARY else size


@pytest.fixture(scope="module", params=ALGORITHMS)
def fitted(world, request):
    """Each algorithm with a reduced vocabulary, after it has memorised one packed row of four conversations."""
    model, kwargs = world.build(config_of(request.param), reduced(request.param, 256))
    options = {"steps": 150, "lr": 1e-2, **FIT.get(request.param, {})}
    fit(model, kwargs, row_of(world, model, 0, 1, 2, 3), **options)
    return model.eval()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_equals_unpacked(world, name):
    """Documents never see each other: loss and gradients of a packed row are those of its documents one by one."""
    check_packed_conversations(world, *world.build(config_of(name, **UNDRAWN.get(name, {}))))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_documents_and_padding_do_not_leak(world, name):
    """The content of a later document or of padding changes no draft logit of the first document."""
    check_documents_are_apart(world, world.build(config_of(name))[0])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_without_supervised_tokens_is_zero(world, name):
    """A row without supervised tokens has a loss of 0 and gradients of 0 for every parameter, never nan."""
    check_empty_row(world, *world.build(config_of(name)))


def test_one_batch_is_learnt_by_heart(world, fitted):
    """On the batch that was memorised, more than 0.9 of the drafts are accepted."""
    assert accepted_share(world, fitted, range(4)) > 0.9


def test_replay_equals_live_round_for_round(world, fitted):
    """At T = 0 each live round accepts what replay says, tau is equal, and the output is the verifier's own."""
    replayed, decoded = check_replay_equals_live(world, fitted, range(8))
    assert count_decoded(decoded, K).tau == pytest.approx(replayed.counts(K).tau)


@torch.no_grad()
@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounds_in_which_others_proposed_may_be_read_at_once(world, name):
    """A drafter that read its tokens in pieces of any size drafts as one that began with all; 1e-5 is float32."""
    model = scramble(world.build(config_of(name), reduced(name, 256))[0]).eval()
    drafter = model.draft()
    tokens = torch.tensor(world.prompts[0] + world.answers[0])
    states = world.engine.capture([tokens], drafter.target_layer_ids)[0][0][:-1]
    state = drafter.begin(tokens[:7], states[:6])
    for start, stop in ((7, 20), (20, 21), (21, len(tokens))):
        drafter.propose(state, num_tokens=K, temperature=0.0, generator=None)
        drafter.advance(state, tokens[start:stop], states[start - 1 : stop - 1])
    drafts = [
        drafter.propose(each, num_tokens=K, temperature=1.0, generator=torch.Generator().manual_seed(0)).probs
        for each in (state, drafter.begin(tokens, states))
    ]
    assert torch.allclose(*drafts, atol=1e-5)


def test_sampled_drafts_come_with_their_distribution(world, fitted):
    """At T > 0 each drafted token has the distribution it was drawn from, over the verifier's vocabulary."""
    drafter = fitted.draft()
    tokens = torch.tensor(world.prompts[0] + world.answers[0][:1])
    states = world.engine.capture([tokens], drafter.target_layer_ids)[0][0]
    state = drafter.begin(tokens, states[:-1])
    proposal = drafter.propose(state, num_tokens=K, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert proposal.probs is not None
    assert proposal.probs.shape == (K, world.engine.facts.vocab_size)
    assert torch.allclose(proposal.probs.sum(-1), torch.ones(K), atol=1e-5)
    assert (proposal.probs.gather(-1, proposal.tokens[:, None]) > 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_saved_and_loaded_drafts_the_same(world, name, tmp_path):
    """A saved speculator loads and computes equal logits."""
    check_saved_is_the_same(world, world.build(config_of(name))[0], tmp_path)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A verifier with three tokens."""
    return world_of_three_tokens(tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_sampled_responses_have_the_verifiers_exact_distribution(three, name):
    """They have that of a verifier with three tokens, of which two can be drafted."""
    check_sampling_is_exact(three, scramble(three.build(config_of(name), reduced(name, 2))[0]))


def test_a_drafter_that_reports_another_distribution_is_detected(three, monkeypatch):
    """The test above finds drafts that come from a colder distribution than the drafter says."""
    model = scramble(three.build(config_of(ALGORITHMS[0]), reduced(ALGORITHMS[0], 2))[0])
    drafter = model.draft()
    propose = drafter.propose

    def cold(state, *, temperature, **options):
        proposal = propose(state, temperature=temperature / 2, **options)
        warm = proposal.probs.sqrt()
        return attrs.evolve(proposal, probs=warm / warm.sum(-1, keepdim=True))

    monkeypatch.setattr(drafter, "propose", cold)
    monkeypatch.setattr(model, "draft", lambda: drafter)
    with pytest.raises(AssertionError):
        check_sampling_is_exact(three, model)
