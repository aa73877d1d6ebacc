"""What every registered algorithm is proved to do; an algorithm that is added is proved by being there."""

from __future__ import annotations

import itertools

import pytest
import torch
from toys import fit_p_value
from transformers import AutoModelForCausalLM

from speculators.bench.counts import count_decoded
from speculators.bench.replay import replay
from speculators.bench.walk import greedy_rounds
from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

from .conftest import World
from .proof import fit, judged, live

ALGORITHMS = CONFIGS.names()
K = 3

# What makes training exhaustive on a handful of tokens: nothing left out at random, all depths weighed alike.
OPTIONS: dict[str, dict] = {
    "eagle3": {"ttt_steps": 3},
    "eagle1": {"alignment_steps": 3, "noise": 0.0, "loss": {"ce": 1.0}},
    "peagle": {"num_depths": 4, "keep": 1.0},
    "dflash": {"num_layers": 2, "block_size": 5, "weights": "exponential", "gamma": 1e6},
    "dspark": {"num_layers": 2, "block_size": 4, "markov_rank": 16, "gamma": 1e6, "loss": {"ce": 1.0}},
}

# Algorithms that draft from the verifier's whole vocabulary only.
WHOLE_VOCABULARY = {"mtp"}

# float32 sums in another order; losses are of order 10.
TOLERANCE = 5e-5

INPUTS = ("hidden_states", "input_ids", "position_ids", "document_ids")


def config_of(name: str) -> SpeculatorModelConfig:
    return SpeculatorModelConfig.get_class(name)(**OPTIONS.get(name, {}))


@pytest.fixture(scope="module", params=ALGORITHMS)
def fitted(world, request):
    """Each algorithm, with a reduced vocabulary, after one packed row of four conversations was learnt by heart."""
    config = config_of(request.param)
    ids = world.layer_ids(config)
    model, kwargs = world.build(config, None if request.param in WHOLE_VOCABULARY else 256)
    fit(model, kwargs, world.row(0, 1, 2, 3, layer_ids=ids), steps=250)
    return model.eval(), ids


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_equals_unpacked(world, name):
    """Documents never see each other: loss and gradients of a packed row are those of its documents one by one."""
    config = config_of(name)
    ids = world.layer_ids(config)
    model, kwargs = world.build(config)
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    packed = world.row(0, 1, 2, layer_ids=ids)
    _, loss, _ = model(**packed, **kwargs)
    grads = torch.autograd.grad(loss, list(named.values()))
    total, sums = 0.0, [torch.zeros_like(p) for p in named.values()]
    for index in (0, 1, 2):
        row = world.row(index, layer_ids=ids)
        _, single, _ = model(**row, **kwargs)
        share = row["loss_mask"].sum() / packed["loss_mask"].sum()
        total += float(single.detach() * share)
        for held, grad in zip(sums, torch.autograd.grad(single * share, list(named.values())), strict=True):
            held += grad
    assert abs(float(loss.detach()) - total) < TOLERANCE
    for key, mine, theirs in zip(named, grads, sums, strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE, key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_documents_and_padding_do_not_leak(world, name):
    """What a later document or padding holds changes no draft logit of the first document."""
    config = config_of(name)
    ids = world.layer_ids(config)
    model, _ = world.build(config)
    row = {key: tensor for key, tensor in world.row(0, 1, layer_ids=ids).items() if key in INPUTS}
    length = int((row["document_ids"] == 0).sum())
    wanted = [logits[: length - K - 1] for logits in model.replay(**row, num_speculative_tokens=K)]
    other = {key: tensor.clone() for key, tensor in row.items()}
    other["hidden_states"][:, length:] += 1.0
    other["input_ids"][:, length:] = 5
    other["document_ids"][:, length + 2 :] = -1
    for mine, theirs in zip(wanted, model.replay(**other, num_speculative_tokens=K), strict=True):
        assert (mine - theirs[: length - K - 1]).abs().max() < TOLERANCE


def test_one_batch_is_learnt_by_heart(world, fitted):
    """Acceptance of more than 0.9 of K on the batch that was trained on: no mask or offset is wrong."""
    model, ids = fitted
    counts = replay(model, judged(world, range(4), layer_ids=ids), k_max=K, temperature=0.0).counts(K)
    assert counts.accepted.sum() / counts.reached.sum() > 0.9


def test_replay_equals_live_round_for_round(world, fitted):
    """At T = 0 live decoding accepts in each round what replay says, gives the verifier's own tokens, and equal tau."""
    model, ids = fitted
    rows = judged(world, range(8), layer_ids=ids)
    replayed = replay(model, rows, k_max=K, temperature=0.0)
    decoded = [live(world, model, row, num_tokens=K) for row in rows]
    for row, table, one in zip(rows, replayed.acceptance, decoded, strict=True):
        assert tuple(one.tokens) == row.response.answer
        assert [(each.anchor, each.accepted) for each in one.rounds] == greedy_rounds(table, K)
    assert count_decoded(decoded, K).tau == pytest.approx(replayed.counts(K).tau)


def test_sampled_drafts_come_with_their_distribution(world, fitted):
    """At T > 0 each drafted token has the distribution it was drawn from, over the verifier's vocabulary."""
    model, ids = fitted
    drafter = model.draft()
    tokens = torch.tensor(world.prompts[0] + world.answers[0][:1])
    states = world.engine.capture([tokens], ids)[0][0]
    state = drafter.begin(tokens, states[:-1])
    proposal = drafter.propose(state, num_tokens=K, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert proposal.probs is not None
    assert proposal.probs.shape == (K, world.engine.facts.vocab_size)
    assert torch.allclose(proposal.probs.sum(-1), torch.ones(K), atol=1e-5)
    assert (proposal.probs.gather(-1, proposal.tokens[:, None]) > 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_saved_and_loaded_drafts_the_same(world, name, tmp_path):
    """A saved speculator loads and computes equal logits."""
    config = config_of(name)
    ids = world.layer_ids(config)
    model, _ = world.build(config)
    model.save_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path)
    row = {key: tensor for key, tensor in world.row(0, layer_ids=ids).items() if key in INPUTS}
    model.eval()
    pairs = zip(
        model.replay(**row, num_speculative_tokens=K), loaded.replay(**row, num_speculative_tokens=K), strict=True
    )
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_sampled_responses_have_the_verifiers_exact_distribution(name, tmp_path):
    """On a verifier with eight tokens, 800 live responses of three tokens fit all 512 exact probabilities."""
    folder = make_tiny_verifier(tmp_path / "eight", vocab_size=8, num_hidden_layers=4, seed=3)
    verifier = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    world = World(folder, Engine(folder, dtype="float32"), [], [])
    config = config_of(name)
    model, _ = world.build(config)
    for parameter in model.layers.parameters():
        if parameter.ndim > 1:
            # Far from the verifier, so that drafts are refused often.
            torch.nn.init.normal_(parameter, std=0.5)
    model.eval()
    prompt, temperature = [1, 5, 3], 0.8
    every = torch.tensor([[*prompt, *tail] for tail in itertools.product(range(8), repeat=2)])
    with torch.no_grad():
        log_p = torch.log_softmax(verifier(every).logits / temperature, dim=-1)
    rows = torch.arange(64)
    exact = (log_p[rows, 2, every[:, 3]] + log_p[rows, 3, every[:, 4]])[:, None] + log_p[:, 4]
    drafter, generator, seen = model.draft(), torch.Generator().manual_seed(11), torch.zeros(64, 8)
    cached = CachedVerifier(verifier, drafter.target_layer_ids)
    options = {"max_new_tokens": 3, "num_tokens": 2, "temperature": temperature, "generator": generator}
    for _ in range(800):
        a, b, c = decode(cached, drafter, torch.tensor(prompt), **options).tokens
        seen[8 * a + b, c] += 1
    assert fit_p_value(seen, exact.exp()) > 0.01
