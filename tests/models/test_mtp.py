"""MTP: what it computes, what it saves, and that a verifier's own head survives extraction and stitching bit by bit."""

from __future__ import annotations

import json
import shutil

import attrs
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from speculators.contract import build_model
from speculators.errors import ArtifactError, ContractError
from speculators.facts import VerifierFacts
from speculators.models import chains
from speculators.models.mtp import MtpSpeculatorConfig, stitch
from speculators.models.mtp import native as native_module
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

from . import dense, proof

VARIANTS = {
    "distilled": {},
    "data tokens": {"targets": "data", "loss": {"ce": 1.0}},
    "qwen3 layer": {"decoder": {"model_type": "qwen3"}},
    "sliding window": {"decoder": {"sliding_window": 5}},
}
HYBRID = {
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
NATIVE = {"qwen3_next": {**HYBRID, **EXPERTS}, "qwen3_5_text": HYBRID, "qwen3": {}}


LAYERS = {"qwen3_next": Qwen3NextDecoderLayer, "qwen3_5_text": Qwen3_5DecoderLayer, "qwen3": Qwen3DecoderLayer}


def build(world, options):
    return world.build(MtpSpeculatorConfig(**options))


def dense_states(model, states, tokens, steps):
    """Computes the draft's states [K, n, H] of one document in float64, with a dense mask over all steps' keys."""
    p = dense.wide_parameters(model)
    layer = {key.removeprefix("mtp_layers.0."): value for key, value in p.items()}
    target = dense.norm(states.double(), p["verifier_norm.weight"])
    state, history, found = target, [], []
    for step in range(steps):
        read = tokens[(torch.arange(len(tokens)) + 1 + step).clamp_max(len(tokens) - 1)]
        e = dense.norm(p["embed_tokens.weight"][read], layer["token_layernorm.weight"])
        x = torch.cat((e, dense.norm(state, layer["hidden_layernorm.weight"])), -1) @ layer["input_proj.weight"].T
        inputs = dense.norm(x, layer["input_layernorm.weight"])
        x = dense.dense_layer(model, p, "mtp_layers.0.", inputs, x, history)
        state = dense.norm(x, layer["final_layernorm.weight"])
        found.append(state)
    return p, target, found


@pytest.mark.parametrize("targets", ["verifier", "data"])
def test_the_loss_is_the_plain_definition(world, targets):
    """Loss and gradients of two packed documents equal a dense float64 computation, place by place."""
    model, kwargs = build(world, {"targets": targets})
    row = proof.row_of(world, model, 0, 1)
    loss, grads = proof.gradients(model, kwargs, proof.with_padding(row))
    count, expected, wanted = int(row["loss_mask"].sum()), 0.0, None
    for document in (0, 1):
        mine = row["document_ids"][0] == document
        tokens, mask = row["input_ids"][0, mine], row["loss_mask"][0, mine]
        p, target, states = dense_states(model, row["verifier_last_hidden_states"][0, mine], tokens, 3)
        total = torch.zeros((), dtype=torch.float64)
        for place in torch.nonzero(mask)[:, 0].tolist():
            log_p = torch.log_softmax(p["lm_head.weight"] @ target[place - 1], -1)
            for step in range(3):
                if place - 2 - step < 0:
                    continue
                log_q = torch.log_softmax(p["lm_head.weight"] @ states[step][place - 2 - step], -1)
                distilled = (log_p.exp() * (log_p - log_q)).sum()
                cost = distilled if targets == "verifier" else -log_q[tokens[place]]
                total = total + 0.6**step / (1 + 0.6 + 0.36) * cost / count
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


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """At T = 0 the walk over the replay and the live decode accept the same drafts; the output is lossless."""
    model, kwargs = build(world, VARIANTS[name])
    proof.fit(model, kwargs, proof.row_of(world, model, 0, 1), steps=25)
    proof.check_replay_equals_live(world, model.eval())


@pytest.mark.parametrize("name", ["distilled", "sliding window"])
def test_replay_logits_are_the_live_ones(world, name, monkeypatch):
    """From any place where a round starts, the logits of each depth equal the replay's."""
    proof.check_replay_logits_equal_live(world, build(world, VARIANTS[name])[0], monkeypatch, chains)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same(world, name, tmp_path):
    """A saved speculator drafts the same logits."""
    proof.check_saved_is_the_same(world, build(world, VARIANTS[name])[0], tmp_path)


def test_a_reduced_draft_vocabulary_is_refused(world):
    """A reduced vocabulary is an error that says what to leave out: the head is the verifier's own."""
    with pytest.raises(ContractError, match=r"leave out algorithm\.draft_vocab_size"):
        world.build(MtpSpeculatorConfig(), 96)


def test_the_checkpoint_has_the_layout_of_the_served_one(world, tmp_path):
    """All trained tensors are under mtp_layers.0, with the frozen ones beside them."""
    model, _ = build(world, {})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == "mtp"
    assert config["architectures"] == ["MTPDraftModel"]
    assert config["num_nextn_predict_layers"] == 1
    assert not {"native", "mtp_steps", "mtp_beta", "targets", "loss", "num_layers"} & set(config)
    vocab = world.engine.facts.vocab_size
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    norms = ("hidden_layernorm", "token_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm")
    assert shapes == {
        **{f"mtp_layers.0.{name}.weight": [32] for name in norms},
        "mtp_layers.0.input_proj.weight": [32, 64],
        "mtp_layers.0.self_attn.q_proj.weight": [32, 32],
        "mtp_layers.0.self_attn.k_proj.weight": [16, 32],
        "mtp_layers.0.self_attn.v_proj.weight": [16, 32],
        "mtp_layers.0.self_attn.o_proj.weight": [32, 32],
        "mtp_layers.0.mlp.gate_proj.weight": [64, 32],
        "mtp_layers.0.mlp.up_proj.weight": [64, 32],
        "mtp_layers.0.mlp.down_proj.weight": [32, 64],
        "embed_tokens.weight": [vocab, 32],
        "lm_head.weight": [vocab, 32],
        "verifier_norm.weight": [32],
    }


def native_names(model_type: str) -> dict[str, list[int]]:
    """Names and shapes of the head in a published checkpoint of that architecture, in the tiny verifier's shape."""
    attn, mlp, gated = "mtp.layers.0.self_attn.", "mtp.layers.0.mlp.", model_type != "qwen3"
    names = {
        "mtp.fc.weight": [32, 64],
        **{f"mtp.{name}.weight": [32] for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")},
        **{f"mtp.layers.0.{name}_layernorm.weight": [32] for name in ("input", "post_attention")},
        f"{attn}q_proj.weight": [64 if gated else 32, 32],
        **{f"{attn}{name}_proj.weight": [16, 32] for name in ("k", "v")},
        f"{attn}o_proj.weight": [32, 32],
        **{f"{attn}{name}_norm.weight": [8] for name in ("q", "k")},
    }
    places = {mlp: 64} if model_type != "qwen3_next" else {f"{mlp}shared_expert.": 24}
    if model_type == "qwen3_next":
        names |= {f"{mlp}gate.weight": [8, 32], f"{mlp}shared_expert_gate.weight": [1, 32]}
        places |= {f"{mlp}experts.{expert}.": 16 for expert in range(8)}
    for place, inner in places.items():
        names |= {f"{place}{name}_proj.weight": [inner, 32] for name in ("gate", "up")}
        names[f"{place}down_proj.weight"] = [32, inner]
    return names


@attrs.frozen
class Native:
    """A tiny bf16 verifier with its own head, and a row of random tokens with its states."""

    folder: object
    row: dict[str, torch.Tensor]
    facts: VerifierFacts


@pytest.fixture(scope="module", params=NATIVE)
def native(request, tmp_path_factory) -> Native:
    """Each architecture that comes with a head, its tensors in two files."""
    folder = make_tiny_verifier(
        tmp_path_factory.mktemp("native") / "v", model_type=request.param, **NATIVE[request.param]
    )
    body = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(3)
    head = {
        name: torch.randn(shape, generator=generator).mul(0.3).bfloat16()
        for name, shape in native_names(request.param).items()
    }
    split = {"model-00001-of-00002.safetensors": body, "model-00002-of-00002.safetensors": head}
    for file, tensors in split.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, tensors in split.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    engine = Engine(folder, dtype="float32")
    lengths, tokens = (20, 13), torch.randint(3, 300, (33,), generator=generator)
    captured = [engine.capture([part], (4,))[0][1] for part in tokens.split(lengths)]
    row = {
        "hidden_states": torch.cat(captured)[None],
        "verifier_last_hidden_states": torch.cat(captured)[None],
        "input_ids": tokens[None],
        "loss_mask": torch.cat([torch.arange(n) >= 5 for n in lengths])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "document_ids": torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None],
    }
    return Native(folder, row, engine.facts)


def build_native(world, native, **options):
    config = MtpSpeculatorConfig(native=True, **options)
    tiny = attrs.evolve(world, folder=native.folder)
    kwargs = tiny.kwargs(config)
    model = build_model("mtp", native.facts, kwargs)
    return model, model.get_trainer_kwargs(**kwargs)[0]


def test_an_untrained_native_head_goes_out_and_back_to_the_bit(world, native, tmp_path):
    """Extracted, saved, stitched: every file of the new verifier has the bytes of the old one's tensors."""
    model, _ = build_native(world, native)
    model.save_pretrained(tmp_path / "speculator")
    stitch(tmp_path / "speculator", native.folder, tmp_path / "stitched")
    assert {file.name for file in (tmp_path / "stitched").iterdir()} == {file.name for file in native.folder.iterdir()}
    for file in native.folder.glob("*.safetensors"):
        old, new = load_file(file), load_file(tmp_path / "stitched" / file.name)
        assert list(old) == list(new)
        for name, tensor in old.items():
            assert tensor.dtype == new[name].dtype
            assert torch.equal(tensor, new[name]), name


def test_a_trained_native_head_is_stitched_back(world, native, tmp_path):
    """After training the stitched verifier has the trained tensors, rounded to its dtype, and nothing else changed."""
    model, kwargs = build_native(world, native)
    first = float(model(**native.row, **kwargs)[1].detach())
    last = float(proof.fit(model, kwargs, native.row, steps=20)["loss"])
    assert last < 0.8 * first
    model.save_pretrained(tmp_path / "speculator")
    stitch(tmp_path / "speculator", native.folder, tmp_path / "stitched")
    again, _ = build_native(world, attrs.evolve(native, folder=tmp_path / "stitched"))
    for name, tensor in model.state_dict().items():
        wanted = tensor.bfloat16().float() if name.startswith("mtp_layers.") else tensor
        assert torch.equal(again.state_dict()[name], wanted), name
    # Stitching never overwrites.
    with pytest.raises(ArtifactError, match="name a new folder"):
        stitch(tmp_path / "speculator", native.folder, tmp_path / "stitched")


@pytest.mark.parametrize("failure", ["shape", "disk", "damaged"])
def test_a_stitched_verifier_is_whole_or_not_there(world, native, tmp_path, monkeypatch, failure):
    """A failed stitch leaves nothing behind, says what is wrong, and can be repeated."""
    model, _ = build_native(world, native)
    model.save_pretrained(tmp_path / "speculator")
    verifier = tmp_path / "verifier"
    shutil.copytree(native.folder, verifier)
    head = verifier / "model-00002-of-00002.safetensors"
    message = "cannot be written from"
    if failure == "shape":
        tensors = load_file(head)
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :40].contiguous()
        save_file(tensors, head, metadata={"format": "pt"})
        message = r"mtp.fc.weight is \[32, 40\]"
    elif failure == "damaged":
        other = verifier / "model-00003-of-00003.safetensors"
        other.write_bytes(head.read_bytes()[:-8])
    else:

        def full(tensors, path, metadata):
            path.write_bytes(b"a part")
            raise SafetensorError("No space left on device (os error 28)")

        monkeypatch.setattr(native_module, "save_file", full)
        message = "No space left"
    with pytest.raises(ArtifactError, match=message):
        stitch(tmp_path / "speculator", verifier, tmp_path / "stitched")
    assert not list(tmp_path.glob("stitched*"))
    monkeypatch.undo()
    stitch(tmp_path / "speculator", native.folder, tmp_path / "stitched")


def test_a_native_head_is_packed_and_replayed_like_any(world, native, monkeypatch, tmp_path):
    """Gates and experts pass the same proofs: packed equals unpacked, live equals replay, loaded equals saved."""
    model, kwargs = build_native(world, native)
    row = native.row
    documents = (slice(0, 20), slice(20, 33))
    singles = [{key: tensor[:, places] for key, tensor in row.items()} for places in documents]
    proof.check_packed_equals_unpacked(model, kwargs, row, singles)
    # As a loaded one: what is frozen had the file's dtype.
    model.float().eval()
    document = {key: row[key][:, :20] for key in proof.INPUTS}
    replayed = list(model.replay(**document, num_speculative_tokens=3))
    tokens, states = row["input_ids"][0, :20], row["hidden_states"][0, :20]
    drafter, seen = model.draft(), []

    def choose(logits, temperature, generator):
        seen.append(logits)
        return tokens[6 + len(seen) : 7 + len(seen)], None

    monkeypatch.setattr(chains, "pick", choose)
    state = drafter.begin(tokens[:7], states[:6])
    drafter.propose(state, num_tokens=3, temperature=0.0, generator=None)
    for depth, logits in enumerate(seen):
        assert (logits - replayed[depth][5]).abs().max() < 1e-5 * logits.abs().max()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(next(iter(loaded.replay(**document, num_speculative_tokens=1))), replayed[0])


def test_the_layer_is_transformers_own(world, native):
    """Head norms, gated attention with partial rotary, offset norms and experts equal transformers' own layer."""
    model, _ = build_native(world, native)
    config = AutoConfig.for_model(**native.facts.to_dict())
    config._attn_implementation = "eager"
    layer = LAYERS[native.facts["model_type"]](config, 3).float()
    around = ("hidden_layernorm", "token_layernorm", "input_proj", "final_layernorm")
    own = model.mtp_layers[0].state_dict()
    layer.load_state_dict({name: tensor for name, tensor in own.items() if not name.startswith(around)})
    n = 20
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    cos_sin, mask = model.rotary(torch.arange(n)), torch.full((1, 1, n, n), -torch.inf).triu(1)
    segments = (chains.Segment(0, 0, n),)

    def attend(q, k, v):
        return chains.unrolled_attention(q, (k, v), [], segments, scale=model.scale)

    with torch.no_grad():
        wanted = layer(x[None], position_embeddings=tuple(part[None, :, 0] for part in cos_sin), attention_mask=mask)[0]
        mtp = model.mtp_layers[0]
        # What stands around the decoder is taken away: the projection hands x on, the last norm is left out.
        mtp.token_layernorm = mtp.hidden_layernorm = mtp.final_layernorm = torch.nn.Identity()
        mtp.input_proj = torch.nn.Linear(64, 32, bias=False)
        mtp.input_proj.weight.copy_(torch.cat((torch.zeros(32, 32), torch.eye(32)), 1))
        found = mtp(x, torch.zeros_like(x), cos_sin, attend, None)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_native_without_a_head_is_an_error(world):
    """`native` with a verifier that has no MTP head is an error; no other head is trained instead."""
    with pytest.raises(ArtifactError, match="no native head"):
        build(world, {"native": True})


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_replay_through_a_hybrid_verifier_equals_live_round_for_round(world, model_type, tmp_path):
    """Also with linear-attention layers, live accepts what replay says and the output is the verifier's own."""
    folder = make_tiny_verifier(tmp_path / "v", model_type=model_type, **NATIVE[model_type])
    engine = Engine(folder, dtype="float32")
    hybrid = attrs.evolve(
        world, folder=folder, engine=engine, answers=engine.generate(world.prompts, max_new_tokens=24)
    )
    model, kwargs = build(hybrid, {})
    proof.fit(model, kwargs, proof.row_of(hybrid, model, 0, 1), steps=40)
    _, decoded = proof.check_replay_equals_live(hybrid, model.eval())
    accepted = {each.accepted for one in decoded for each in one.rounds}
    assert {0, proof.K} <= accepted
