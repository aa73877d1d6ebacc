"""EAGLE-3: what it computes, what it saves, and that training, replay and live decoding are one computation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators.bench.counts import count_decoded
from speculators.bench.replay import replay
from speculators.contract import build_model
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from speculators.verifier.weights import load_head

from .conftest import LAYER_IDS
from .proof import (
    accepted_share,
    check_packed_conversations,
    check_replay_equals_live,
    check_saved_is_the_same,
    fit,
    judged,
    live,
)

VARIANTS = {
    "plain": {},
    "reduced vocabulary": {"draft_vocab_size": 96},
    "trainable head": {"lm_head_trainable": True},
    "norms of 3.1": {"fc_norm": True, "norm_output": True},
    "norm before fc": {"norm_before_fc": True, "norm_before_residual": False},
    "two layers": {"num_layers": 2},
    "qwen3 layers": {"decoder": {"model_type": "qwen3"}},
    "sliding window": {"decoder": {"sliding_window": 5}},
}

# float32 sums in another order; losses are of order 10.
TOLERANCE = 2e-5


def config_of(**options) -> Eagle3SpeculatorConfig:
    options.pop("draft_vocab_size", None)
    return Eagle3SpeculatorConfig(**options)


def build(world, options):
    return world.build(config_of(**options), options.get("draft_vocab_size"))


@pytest.fixture(scope="module")
def overfitted(world):
    """A model that has memorised the first four conversations."""
    model, kwargs = world.build(Eagle3SpeculatorConfig(ttt_steps=4, loss={"ce": 1.0}))
    fit(model, kwargs, world.row(0, 1, 2, 3))
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_unpacked(world, name):
    """Loss and gradients of a packed row, padded or not, are those of its documents one by one."""
    check_packed_conversations(world, *build(world, VARIANTS[name]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_the_plain_definition(world, temperature):
    """Depth k of row i reads x_{i+1+k} at position i + k, and its target p comes from the state at i + 1 + k.

    p is the verifier's distribution at `target_temperature`, and q the draft's at 1.
    """
    model, kwargs = build(world, {"target_temperature": temperature})
    row = world.row(0)
    _, loss, _ = model(**row, **kwargs)
    logits = list(
        model.replay(
            **{key: row[key] for key in ("hidden_states", "input_ids", "position_ids", "document_ids")},
            num_speculative_tokens=kwargs["ttt_steps"],
        )
    )
    head = load_head(world.folder, world.engine.facts)
    target = (head.logits(row["verifier_last_hidden_states"][0]) / temperature).log_softmax(-1)
    places = torch.nonzero(row["loss_mask"][0])[:, 0]
    expected = 0.0
    for depth, z in enumerate(logits):
        log_p, log_q = target[places - 1], z.log_softmax(-1)[places - 2 - depth]
        expected += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert abs(float(loss.detach()) - expected) < TOLERANCE


def test_only_training_drops_states_and_a_seed_decides_which(world):
    """A dropped place gives fc no gradient, the share is the recipe's, and validation drops nothing."""
    model, kwargs = world.build(config_of(state_dropout=0.4))
    _, validation = model.get_trainer_kwargs(**world.kwargs(config_of(state_dropout=0.4)))
    plain, _ = world.build(config_of())
    row = world.row(*range(8))

    def loss_and_dropped(given, seed):
        """The loss, and which places gave fc no gradient."""
        torch.manual_seed(seed)
        states = row["hidden_states"].clone().requires_grad_()
        _, loss, _ = model(**{**row, "hidden_states": states}, **given)
        (grad,) = torch.autograd.grad(loss, states)
        return float(loss.detach()), grad[0].abs().amax(-1) == 0

    whole, unread = loss_and_dropped(validation, 1)
    assert whole == float(plain(**row, **validation)[1].detach())
    first, dropped = loss_and_dropped(kwargs, 1)
    again, same = loss_and_dropped(kwargs, 1)
    other, _ = loss_and_dropped(kwargs, 2)
    assert first == again != other
    assert torch.equal(dropped, same)
    # 3 standard deviations of a binomial share.
    read = ~unread
    share = float(dropped[read].float().mean())
    assert abs(share - 0.4) < 3 * (0.24 / int(read.sum())) ** 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """At T = 0 the walk over the replay and the live decode accept the same drafts each round; lossless output."""
    model, kwargs = build(world, VARIANTS[name])
    fit(model, kwargs, world.row(0, 1), steps=25)
    check_replay_equals_live(world, model.eval())


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same(world, name, tmp_path):
    """A saved speculator drafts the same logits."""
    check_saved_is_the_same(world, build(world, VARIANTS[name])[0], tmp_path)


def test_the_checkpoint_has_the_layout_that_vllm_loads(world, tmp_path):
    """config.json has the keys, and model.safetensors the names and shapes, of a checkpoint that vLLM loaded."""
    from safetensors.torch import load_file

    model, _ = build(world, {"draft_vocab_size": 96})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Eagle3DraftModel"]
    assert config["speculators_model_type"] == "eagle3"
    assert config["draft_vocab_size"] == 96
    assert config["eagle_aux_hidden_state_layer_ids"] == list(LAYER_IDS)
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(world.folder)
    layer = config["transformer_layer_config"]
    assert layer["num_hidden_layers"] == 1
    assert layer["rope_parameters"] == world.engine.facts.rope_parameters
    assert layer["max_position_embeddings"] == world.engine.facts.max_position_embeddings
    assert not {"ttt_steps", "loss", "num_layers"} & set(config)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        "fc.weight": [32, 96],
        "layers.0.hidden_norm.weight": [32],
        "layers.0.input_layernorm.weight": [32],
        "layers.0.post_attention_layernorm.weight": [32],
        "layers.0.self_attn.q_proj.weight": [32, 64],
        "layers.0.self_attn.k_proj.weight": [16, 64],
        "layers.0.self_attn.v_proj.weight": [16, 64],
        "layers.0.self_attn.o_proj.weight": [32, 32],
        "layers.0.mlp.gate_proj.weight": [64, 32],
        "layers.0.mlp.up_proj.weight": [64, 32],
        "layers.0.mlp.down_proj.weight": [32, 64],
        "norm.weight": [32],
        "lm_head.weight": [96, 32],
        "embed_tokens.weight": [world.engine.facts.vocab_size, 32],
        "d2t": [96],
        "t2d": [world.engine.facts.vocab_size],
    }


def test_a_missing_or_foreign_tensor_is_named(world, tmp_path):
    """A checkpoint with a missing or an unknown tensor is an error that names both, never a model of random numbers."""
    from safetensors.torch import load_file, save_file

    model, _ = build(world, {})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stranger"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"missing: lm_head.weight; unknown: stranger"):
        SpeculatorModel.from_pretrained(tmp_path)


def test_frozen_pieces_are_the_verifiers(world):
    """The embeddings, and the head unless it is trained, are the verifier's rows and get no gradient."""
    model, kwargs = build(world, {"draft_vocab_size": 96})
    verifier = world.engine.model
    assert torch.equal(model.embed_tokens.weight, verifier.get_input_embeddings().weight)
    rows = model.draft_to_target
    assert torch.equal(model.lm_head.weight, verifier.get_output_embeddings().weight[rows])
    assert model.t2d.nonzero()[:, 0].tolist() == rows.tolist()
    _, loss, _ = model(**world.row(0), **kwargs)
    loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.embed_tokens.weight.grad is None


def test_unknown_decoder_is_refused(world):
    """A decoder type that no layer here implements is an error that lists those that exist."""
    with pytest.raises(SpeculatorsError, match="llama, qwen3"):
        build(world, {"decoder": {"model_type": "mamba"}})


def test_one_batch_is_learnt_by_heart(world, overfitted):
    """On the batch that was memorised, more than 0.95 of the drafts are accepted at each K."""
    assert min(accepted_share(world, overfitted, range(4), k) for k in (1, 3, 4)) > 0.95


def test_live_counts_equal_replay(world, overfitted):
    """Acceptance length of the live decode equals the replay's, token for token."""
    rows = judged(world, range(8))
    decoded = [live(world, overfitted, row, num_tokens=4) for row in rows]
    predicted = replay(overfitted, rows, k_max=4, temperature=0.0).counts(4)
    assert count_decoded(decoded, 4).tau == pytest.approx(predicted.tau)


def test_training_the_head_leaves_the_targets_alone(world):
    """A trained head starts as a copy of the verifier's rows; training it leaves the target's head unchanged."""
    model, _ = world.build(Eagle3SpeculatorConfig(lm_head_trainable=True))
    before = model.target_head.weight.clone()
    assert torch.equal(model.lm_head.weight, before)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(model.target_head.weight, before)


def test_what_is_frozen_keeps_the_dtype_of_the_file(world, tmp_path):
    """Embeddings and a frozen head of a bf16 verifier are not widened; the loaded speculator computes in float32."""
    folder = tmp_path / "verifier"
    folder.mkdir()
    for file in world.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = Eagle3SpeculatorConfig()
    kwargs = {**world.kwargs(config), "verifier_name_or_path": str(folder)}
    model = build_model("eagle3", VerifierFacts.read(folder / "config.json"), kwargs)
    assert model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.fc.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = SpeculatorModel.from_pretrained(tmp_path / "saved")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
