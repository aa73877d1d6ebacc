"""Medusa: what it computes, what it saves, and that training, replay and live decoding are one computation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from speculators.bench.replay import replay
from speculators.models.medusa import MedusaSpeculatorConfig, core
from speculators.recipe.schema import OptimizerSection
from speculators.training.optimizer import Optimizer

from . import dense, proof

VARIANTS = {
    "plain": {},
    "reduced vocabulary": {"draft_vocab_size": 96},
    "two blocks a head": {"num_layers": 2},
    "other losses": {"loss": {"kl_div": 1.0, "tv": 0.5}},
}


def build(world, options):
    """A model with heads that differ, and its forward's arguments."""
    own = {key: value for key, value in options.items() if key != "draft_vocab_size"}
    model, kwargs = world.build(MedusaSpeculatorConfig(num_heads=3, **own), options.get("draft_vocab_size"))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.blocks.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return model, kwargs


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_unpacked(world, name):
    """Loss and gradients of a packed row, padded or not, are those of its documents one by one."""
    proof.check_packed_conversations(world, *build(world, VARIANTS[name]))


@pytest.mark.parametrize("name", ["plain", "reduced vocabulary"])
def test_the_loss_is_the_plain_definition(world, name):
    """Head k of row r predicts place r + 2 + k of its own document; the loss equals a float64 sum place by place."""
    model, kwargs = build(world, {**VARIANTS[name], "loss": {"kl_div": 1.0}})
    row = proof.row_of(world, model, 0, 1)
    loss, grads = proof.gradients(model, kwargs, row)
    wide = {key: value.double().requires_grad_() for key, value in model.named_parameters()}
    head = model.target_head
    states, documents = row["verifier_last_hidden_states"][0].double(), row["document_ids"][0]

    def norm(x):
        return x / (x.square().mean() + head.eps).sqrt() * head.norm_weight.double()

    places = torch.nonzero(row["loss_mask"][0])[:, 0].tolist()
    expected = torch.zeros((), dtype=torch.float64)
    for place in places:
        p = torch.softmax(head.weight.double() @ norm(states[place - 1]), -1)
        for k in range(3):
            source = place - 2 - k
            if source < 0 or documents[source] != documents[place]:
                continue
            x = norm(states[source])
            x = x + torch.nn.functional.silu(
                wide[f"blocks.{k}.layers.0.weight"] @ x + wide[f"blocks.{k}.layers.0.bias"]
            )
            log_q = torch.log_softmax(wide[f"lm_heads.{k}.weight"] @ x, -1)
            expected = expected + 0.8**k * (p * (p.log() - log_q)).sum() / len(places)
    assert abs(loss - float(expected.detach())) < dense.TOLERANCE
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, [wide[key] for key in names])
    for mine, theirs in zip(grads, wanted, strict=True):
        assert (mine - theirs).abs().max() < dense.TOLERANCE


def test_untrained_heads_are_the_verifiers(world):
    """Zero blocks and copied heads: every head starts as the verifier's own next-token distribution."""
    model, _ = world.build(MedusaSpeculatorConfig(num_heads=2))
    row = proof.row_of(world, model, 0)
    wanted = model.target_head.logits(row["hidden_states"][0])
    for logits in model.head_logits(row["hidden_states"][0]):
        assert torch.allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """At T = 0 the walk over the replay and the live decode accept the same drafts; the output is lossless."""
    model, kwargs = build(world, VARIANTS[name])
    proof.fit(model, kwargs, proof.row_of(world, model, 0, 1), steps=25)
    proof.check_replay_equals_live(world, model.eval())


def test_more_tokens_than_heads_drafts_as_many_as_there_are_heads(world):
    """K above the number of heads: a round drafts num_heads tokens, and the replay accepts none beyond them."""
    model, kwargs = build(world, {})
    proof.fit(model, kwargs, proof.row_of(world, model, 0, 1), steps=25)
    proof.check_replay_equals_live(world, model.eval(), k=5)
    rows = proof.judged(world, range(2), layer_ids=(4,))
    assert {each.drafted for each in proof.live(world, model, rows[0], num_tokens=5).rounds} == {3}
    for table in replay(model, rows, k_max=5, temperature=0.0).acceptance:
        assert table[:, 3:].max() == 0


def test_replay_logits_are_the_live_ones(world, monkeypatch):
    """From any place where a round starts, each head's logits equal the replay's."""
    proof.check_replay_logits_equal_live(world, build(world, {})[0], monkeypatch, core)


def test_the_heads_top_k_can_be_reached(world):
    """`candidates` gives every head's logits, so that a tree can use more than the most likely token."""
    model, _ = build(world, VARIANTS["reduced vocabulary"])
    drafter = model.eval().draft()
    tokens = torch.tensor(world.prompts[0])
    state = drafter.begin(tokens, world.engine.capture([tokens], (4,))[0][0][:-1])
    logits = drafter.candidates(state, 3)
    assert logits.shape == (3, 96)
    proposal = drafter.propose(state, num_tokens=3, temperature=0.0, generator=None)
    assert proposal.tokens.tolist() == drafter.draft_to_target[logits.topk(4).indices[:, 0]].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same(world, name, tmp_path):
    """A saved speculator drafts the same logits, in the same vocabulary."""
    model, _ = build(world, VARIANTS[name])
    loaded = proof.check_saved_is_the_same(world, model, tmp_path)
    assert torch.equal(loaded.draft_to_target, model.draft_to_target)


def test_the_checkpoint_has_the_layout_that_vllm_loads(world, tmp_path):
    """config.json has vLLM's keys at the top, and the tensors its names and shapes."""
    model, _ = build(world, {"draft_vocab_size": 96})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    vocab = world.engine.facts.vocab_size
    wanted = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 32,
        "vocab_size": vocab,
        "truncated_vocab_size": 96,
        "num_heads": 3,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "target_layer_ids": [4],
    }
    assert {key: config[key] for key in wanted} == wanted
    assert not {"head_decay", "loss", "num_layers"} & set(config)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        **{f"blocks.{k}.layers.0.weight": [32, 32] for k in range(3)},
        **{f"blocks.{k}.layers.0.bias": [32] for k in range(3)},
        **{f"lm_heads.{k}.weight": [96, 32] for k in range(3)},
        "token_map": [96],
        "verifier_norm.weight": [32],
    }


def test_the_heads_are_no_matrices_to_muon(world):
    """Muon orthogonalises only the residual blocks: the rows of a vocabulary are tokens."""
    model, _ = build(world, {})
    optimizer = Optimizer(model, OptimizerSection(name="muon", lr=1e-3), ema=None)
    muon, adamw = (part.param_groups for part, _ in optimizer._parts)
    assert {p.shape for group in muon for p in group["params"]} == {(32, 32)}
    assert sum(len(group["params"]) for group in adamw) == 6


def test_the_loss_of_untrained_heads_is_finite_and_large(world):
    """The untrained heads' loss lies near the entropy of guessing, not near 0: the target does not leak."""
    model, kwargs = world.build(MedusaSpeculatorConfig(num_heads=2))
    _, loss, metrics = model(**proof.row_of(world, model, 0, 1), **kwargs)
    assert math.isfinite(float(loss.detach()))
    assert float(loss.detach()) > 1.0
    assert set(metrics) == {"loss", *(f"{kind}_{k}" for kind in ("accuracy", "conditional") for k in (1, 2))}
