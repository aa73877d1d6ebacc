"""EAGLE: what it computes, what it saves, and that training, replay and live decoding are one computation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from speculators.models import chains
from speculators.models.eagle1 import Eagle1SpeculatorConfig

from . import dense, proof

VARIANTS = {
    "one step": {},
    "aligned": {"alignment_steps": 3, "alignment_decay": 0.7},
    "distilled": {"alignment_steps": 3, "topk": 10, "topk_weight": 0.5},
    "reduced vocabulary": {"alignment_steps": 2, "draft_vocab_size": 96},
    "two layers": {"alignment_steps": 3, "num_layers": 2},
    "qwen3 layers": {"alignment_steps": 2, "decoder": {"model_type": "qwen3"}},
    "sliding window": {"alignment_steps": 2, "decoder": {"sliding_window": 5}},
}


def build(world, options):
    """A model without noise, unless the options say so, and its forward's arguments."""
    own = {"noise": 0.0, **options}
    own.pop("draft_vocab_size", None)
    return world.build(Eagle1SpeculatorConfig(**own), options.get("draft_vocab_size"))


def dense_states(model, states, tokens, steps):
    """Computes the draft's states [K, n, H] of one document in float64, with a dense mask over all steps' keys."""
    p = dense.wide_parameters(model)
    target = dense.norm(states.double(), p["verifier_norm.weight"])
    state, history, found = target, [], []
    for step in range(steps):
        read = tokens[(torch.arange(len(tokens)) + 1 + step).clamp_max(len(tokens) - 1)]
        x = torch.cat((p["embed_tokens.weight"][read], state), -1) @ p["fc.weight"].T
        state = dense.dense_layer(model, p, "layers.0.", x, x, history)
        found.append(state)
    return p, target, found


@pytest.mark.parametrize("name", ["one step", "aligned", "distilled", "reduced vocabulary"])
def test_the_loss_is_the_plain_definition(world, name):
    """Loss and gradients of two packed documents equal a dense float64 computation, place by place."""
    model, kwargs = build(world, VARIANTS[name])
    steps, decay = kwargs["alignment_steps"], kwargs["alignment_decay"]
    row = proof.row_of(world, model, 0, 1)
    loss, grads = proof.gradients(model, kwargs, proof.with_padding(row))
    count = int(row["loss_mask"].sum())
    expected, wanted = 0.0, None
    for document in (0, 1):
        mine = row["document_ids"][0] == document
        tokens, mask = row["input_ids"][0, mine], row["loss_mask"][0, mine]
        p, target, states = dense_states(model, row["verifier_last_hidden_states"][0, mine], tokens, steps)
        total = torch.zeros((), dtype=torch.float64)
        for place in torch.nonzero(mask)[:, 0].tolist():
            log_p = torch.log_softmax(p["lm_head.weight"] @ target[place - 1], -1)
            for step in range(steps):
                if place - 2 - step < 0:
                    continue
                state = states[step][place - 2 - step]
                log_q = torch.log_softmax(p["lm_head.weight"] @ state, -1)
                gap = (state - target[place - 1]).abs()
                distance = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
                value = 0.1 * (log_p.exp() * (log_p - log_q)).sum() + distance
                likeliest = log_p.argsort(descending=True)[: kwargs["topk"]]
                value = value - kwargs["topk_weight"] * (log_p.exp() * log_q)[likeliest].sum()
                total = total + decay**step * value / count
        expected += float(total.detach())
        own = torch.autograd.grad(total, [p[key] for key, value in model.named_parameters() if value.requires_grad])
        wanted = own if wanted is None else [a + b for a, b in zip(wanted, own, strict=True)]
    assert abs(loss - expected) < dense.TOLERANCE
    for mine, theirs in zip(grads, wanted, strict=True):
        assert (mine - theirs).abs().max() < dense.TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_unpacked(world, name):
    """Loss and gradients of a packed row, padded or not, are those of its documents one by one."""
    proof.check_packed_conversations(world, *build(world, VARIANTS[name]))


def test_documents_do_not_see_each_other(world):
    """A change in the second document changes no logit of the first."""
    proof.check_documents_are_apart(world, build(world, VARIANTS["two layers"])[0])


def test_only_training_adds_noise(world):
    """Noise follows torch's generator and changes only the training loss, never the validation loss."""
    model, kwargs = build(world, {"noise": 0.1})
    row = proof.row_of(world, model, 0)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(**row, **kwargs)[1].detach()))
    assert losses[0] == losses[1] != losses[2]
    config = Eagle1SpeculatorConfig(noise=0.1)
    train, val = model.get_trainer_kwargs(**world.kwargs(config))
    assert (train["noise"], val["noise"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """At T = 0 the walk over the replay and the live decode accept the same drafts; the output is lossless."""
    model, kwargs = build(world, VARIANTS[name])
    proof.fit(model, kwargs, proof.row_of(world, model, 0, 1), steps=25)
    proof.check_replay_equals_live(world, model.eval())


@pytest.mark.parametrize("name", ["two layers", "sliding window", "reduced vocabulary"])
def test_replay_logits_are_the_live_ones(world, name, monkeypatch):
    """From any place where a round starts, the logits of each depth equal the replay's."""
    proof.check_replay_logits_equal_live(world, build(world, VARIANTS[name])[0], monkeypatch, chains)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same(world, name, tmp_path):
    """A saved speculator drafts the same logits."""
    proof.check_saved_is_the_same(world, build(world, VARIANTS[name])[0], tmp_path)


def test_the_checkpoint_has_the_layout_of_published_ones(world, tmp_path):
    """Names as in EAGLE's checkpoints (no norm before the first layer), with the frozen pieces beside them."""
    model, _ = build(world, {"draft_vocab_size": 96})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle1"
    assert config["target_layer_ids"] == [4]
    assert not {"alignment_steps", "regression", "loss", "topk", "noise", "num_layers"} & set(config)
    vocab = world.engine.facts.vocab_size
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        "fc.weight": [32, 64],
        "layers.0.post_attention_layernorm.weight": [32],
        "layers.0.self_attn.q_proj.weight": [32, 32],
        "layers.0.self_attn.k_proj.weight": [16, 32],
        "layers.0.self_attn.v_proj.weight": [16, 32],
        "layers.0.self_attn.o_proj.weight": [32, 32],
        "layers.0.mlp.gate_proj.weight": [64, 32],
        "layers.0.mlp.up_proj.weight": [64, 32],
        "layers.0.mlp.down_proj.weight": [32, 64],
        "embed_tokens.weight": [vocab, 32],
        "lm_head.weight": [96, 32],
        "verifier_norm.weight": [32],
        "d2t": [96],
        "t2d": [vocab],
    }
