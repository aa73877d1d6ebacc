"""Block drafters: weights, variants, checkpoints, memory; test_proof covers what every algorithm must do."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from speculators.bench.counts import count_decoded
from speculators.bench.replay import replay, replay_each
from speculators.chunks import CHUNKS
from speculators.config import SpeculatorModelConfig
from speculators.errors import ArtifactError
from speculators.model import SpeculatorModel
from speculators.models.dflash import DFlashSpeculatorConfig
from speculators.models.dflash.core import pace_weights
from speculators.models.dspark import DSparkSpeculatorConfig
from speculators.nn.layout import PackedRow

from .conftest import LAYER_IDS
from .proof import (
    FIRST,
    check_replay_equals_live,
    check_sampling_is_exact,
    fit,
    judged,
    live,
    scramble,
    world_of_three_tokens,
)

K = 3
SMALL = {"num_layers": 2, "block_size": 4}

VARIANTS = {
    "dflash from the anchor": DFlashSpeculatorConfig(**SMALL, sample_from_anchor=True),
    "dflash with d-pace": DFlashSpeculatorConfig(**SMALL),
    "dflash causal": DFlashSpeculatorConfig(**SMALL, sliding_window_non_causal=False),
    "dflash with a window": DFlashSpeculatorConfig(**SMALL, decoder={"sliding_window": 6}),
    "dflash causal with a window": DFlashSpeculatorConfig(
        **SMALL, sliding_window_non_causal=False, decoder={"sliding_window": 6}
    ),
    "dflash with llama layers": DFlashSpeculatorConfig(**SMALL, decoder={"model_type": "llama"}),
    "dspark gated": DSparkSpeculatorConfig(**SMALL, markov_rank=8, markov_head_type="gated"),
    "dspark rnn": DSparkSpeculatorConfig(**SMALL, markov_rank=8, markov_head_type="rnn"),
    "dspark with a threshold": DSparkSpeculatorConfig(**SMALL, markov_rank=8, cut="threshold", threshold=0.6),
    "dspark by gain": DSparkSpeculatorConfig(**SMALL, markov_rank=8, cut="gain", threshold=0.4),
    "dspark, confidence of tokens": DSparkSpeculatorConfig(
        **SMALL, markov_rank=8, cut="threshold", threshold=0.6, confidence_head_with_markov=True
    ),
}


def trained(world, config, steps=40):
    """A partly trained model: some of its drafts are accepted, some are not."""
    model, kwargs = world.build(config, 256)
    fit(model, kwargs, world.row(0, 1, 2, 3), steps=steps)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """Each live round accepts what replay says, also where confidence cuts the block; the output is lossless."""
    model = trained(world, VARIANTS[name])
    replayed, decoded = check_replay_equals_live(world, model)
    if not getattr(VARIANTS[name], "confidence_head_with_markov", False):
        assert count_decoded(decoded, K).drafted.sum() == pytest.approx(replayed.counts(K).drafted.sum())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A verifier with three tokens."""
    return world_of_three_tokens(tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize(("head", "cut"), [("vanilla", "threshold"), ("gated", "gain"), ("rnn", "threshold")])
def test_sampling_is_exact_whatever_cuts_the_block(three, head, cut):
    """Samples stay exact where drafts depend on each other and on where the block was cut."""
    options = {"markov_rank": 8, "markov_head_type": head, "cut": cut, "threshold": 0.5}
    model, _ = three.build(DSparkSpeculatorConfig(**SMALL, **options, confidence_head_with_markov=True), 2)
    # The token before decides alone and for certain: the first draft is made, the second after some of the first ones.
    weight = scramble(model).confidence_head.proj.weight.data
    weight[:, :-8] = 0.0
    weight *= 50 * torch.sign(weight[0, -8:] @ model.markov_head.markov_w1.weight[FIRST].detach())
    decoded = check_sampling_is_exact(three, model)
    assert {one.rounds[0].drafted for one in decoded} == {1, 2}


@pytest.mark.parametrize("name", ["dspark with a threshold", "dspark by gain"])
def test_a_cut_drafts_less_and_loses_little(world, name):
    """Cut blocks draft fewer tokens, and a larger share of them is accepted."""
    model = trained(world, VARIANTS[name])
    rows = judged(world, range(6))
    cut = replay(model, rows, k_max=K, temperature=0.0).counts(K)
    model.config = attrs.evolve(model.config, cut=None)
    whole = replay(model, rows, k_max=K, temperature=0.0).counts(K)
    assert cut.drafted_per_round < whole.drafted_per_round == K
    assert cut.accepted.sum() / cut.drafted.sum() > whole.accepted.sum() / whole.drafted.sum()


def test_the_confidence_learns_the_acceptance(world):
    """After overfitting, confidence predicts the acceptance of the batch's drafts; it starts at one half."""
    config = DSparkSpeculatorConfig(**SMALL, markov_rank=8, loss={"ce": 1.0})
    model, kwargs = world.build(config, 256)
    row = world.row(0, 1, 2, 3)
    before = float(model(**row, **kwargs)[2]["confidence_error"])
    after = float(fit(model, kwargs, row, steps=150)["confidence_error"])
    assert after < 0.5 * before


def test_gain_extends_while_a_token_is_worth_its_cost(world):
    """The chosen length has the most expected tokens per cost of all lengths."""
    model, _ = world.build(DSparkSpeculatorConfig(**SMALL, markov_rank=8, cut="gain", threshold=0.2), 256)
    chances = torch.tensor([0.9, 0.8, 0.5, 0.1])
    reached = chances.cumprod(0)
    rates = [(1 + float(reached[:n].sum())) / (1 + 0.2 * n) for n in range(5)]
    assert int(model.lengths(torch.logit(chances))) == max(range(5), key=rates.__getitem__)


def test_d_pace_is_the_plain_definition(world):
    """w_j sums over i >= j the product of the softened acceptances up to i, block by block."""
    model, kwargs = world.build(DFlashSpeculatorConfig(**SMALL), 256)
    row = world.row(0, 1)
    torch.manual_seed(1)
    packed = PackedRow.of(**row)
    fused, last = packed.cut(row["hidden_states"]), packed.cut(row["verifier_last_hidden_states"])
    drawn = model.draw(packed, fused, last, max_anchors=9)
    values = torch.rand(len(drawn.place)) * 3
    weights = pace_weights(values, drawn, model.depths, 0.5)
    for index in range(len(values)):
        block, depth = int(drawn.block[index]), int(drawn.depth[index])
        own = [i for i in range(len(values)) if int(drawn.block[i]) == block]
        softened = {int(drawn.depth[i]): 0.5 * float((-values[i]).exp()) + 0.5 for i in own}
        total = 0.0
        for last in (d for d in softened if d >= depth):
            product = 1.0
            for d, s in softened.items():
                product *= s if d <= last else 1.0
            total += product
        assert float(weights[index]) == pytest.approx(total / model.depths, rel=1e-5)
    assert kwargs["weights"] == "d-pace"


def test_fewer_anchors_give_the_same_loss_in_the_mean(world):
    """The loss over drawn blocks equals in the mean the loss over all blocks."""
    config = DFlashSpeculatorConfig(**SMALL, weights="exponential")
    model, kwargs = world.build(config, 256)
    row = world.row(0, 1, 2, 3)
    whole = float(model(**row, **{**kwargs, "max_anchors": 10_000})[1].detach())
    torch.manual_seed(2)
    drawn = [float(model(**row, **{**kwargs, "max_anchors": 16})[1].detach()) for _ in range(60)]
    # Standard deviation of one draw is some 3%; of the mean of 60, 0.4%.
    assert sum(drawn) / len(drawn) == pytest.approx(whole, rel=0.02)


def test_d_pace_takes_the_cross_entropy_alone():
    """D-PACE refuses other losses: its weights are probabilities of the target token, which only ce gives."""
    with pytest.raises(ValueError, match="d-pace"):
        DFlashSpeculatorConfig(loss={"kl_div": 1.0})


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_the_logits_of_all_slots_never_exist(world, name, monkeypatch):
    """No tensor of a step, backward included, has slots x vocabulary elements."""
    monkeypatch.setitem(CHUNKS, "cpu", attrs.evolve(CHUNKS["cpu"], product_rows=64))
    options = {"markov_rank": 8} if name == "dspark" else {}
    config = SpeculatorModelConfig.get_class(name)(num_layers=1, block_size=8, **options)
    model, kwargs = world.build(config)
    row = world.row(*range(8))
    with _Largest() as largest:
        drawn, loss, _ = model(**row, **kwargs)
        loss.backward()
    assert len(drawn) > 600
    assert largest.elements < len(drawn) * model.draft_vocab_size // 2


@pytest.mark.parametrize("reduced", [True, False])
def test_the_checkpoint_leaves_out_what_the_verifier_has(world, reduced, tmp_path):
    """A checkpoint omits the embeddings, and a head over the whole vocabulary; other tensors have the served names."""
    model, _ = world.build(DFlashSpeculatorConfig(**SMALL), 256 if reduced else None)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} <= names
    assert names & {"lm_head.weight", "d2t", "t2d"} == ({"lm_head.weight", "d2t", "t2d"} if reduced else set())
    assert not any(name.startswith(("embed_tokens", "target_head", "rotary")) for name in names)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["DFlashSpeculator"]
    assert config["transformer_layer_config"]["model_type"] == "qwen3"
    assert config["aux_hidden_state_layer_ids"] == list(LAYER_IDS)
    assert (config["block_size"], config["sliding_window_non_causal"]) == (4, True)
    assert config["mask_token_id"] == world.engine.facts.vocab_size - 1


def test_a_checkpoint_without_its_verifier_is_one_error(world, tmp_path):
    """A missing verifier is one error that says how to pass it; with it the speculator loads."""
    model, _ = world.build(DFlashSpeculatorConfig(**SMALL), 256)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["speculators_config"]["verifier"]["name_or_path"] = "owner/elsewhere"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match="owner/elsewhere"):
        SpeculatorModel.from_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path, verifier=world.folder)
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)


def test_dspark_names_its_heads_as_they_are_served(world, tmp_path):
    """The Markov head's two matrices and gate, and the confidence's projection, have the names that servers read."""
    config = DSparkSpeculatorConfig(**SMALL, markov_rank=8, markov_head_type="gated")
    world.build(config, 256)[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if "_head." in name}
    assert shapes.pop("lm_head.weight") == [256, 32]
    assert shapes == {
        "markov_head.markov_w1.weight": [320, 8],
        "markov_head.markov_w2.weight": [256, 8],
        "markov_head.gate_proj.weight": [8, 40],
        "markov_head.gate_proj.bias": [8],
        "confidence_head.proj.weight": [1, 32],
        "confidence_head.proj.bias": [1],
    }


def test_dspark_starts_from_a_dflash_checkpoint(world, tmp_path):
    """DSpark takes the backbone of a DFlash checkpoint; if shapes differ, the error names each."""
    source, _ = world.build(DFlashSpeculatorConfig(**SMALL), 256)
    source.save_pretrained(tmp_path)
    warm = world.start(DSparkSpeculatorConfig(**SMALL, markov_rank=8, init_from=str(tmp_path)), 256)
    assert torch.equal(warm.layers[1].mlp.up_proj.weight, source.layers[1].mlp.up_proj.weight)
    assert torch.equal(warm.fc.weight, source.fc.weight)
    with pytest.raises(ArtifactError, match=r"it lacks layers\.2\."):
        world.start(DSparkSpeculatorConfig(num_layers=3, block_size=4, init_from=str(tmp_path)), 256)


@pytest.mark.parametrize(("cut", "non_causal", "passes"), [(None, False, 1), (None, True, 2), ("threshold", True, 4)])
def test_a_drafter_is_replayed_for_each_k_only_where_k_matters(world, monkeypatch, cut, non_causal, passes):
    """Two K take one pass with causal slots, one each if slots see all others, and another each for lengths if cut."""
    config = DSparkSpeculatorConfig(**SMALL, markov_rank=8, cut=cut, sliding_window_non_causal=non_causal)
    model, _ = world.build(config, 256)
    seen = []
    states = model.replay_states
    monkeypatch.setattr(model, "replay_states", lambda **batch: seen.append(1) or states(**batch))
    replay_each(model, judged(world, range(2)), (1, 3), temperature=0.0)
    assert len(seen) == passes


@pytest.mark.parametrize("non_causal", [False, True])
@pytest.mark.parametrize("name", ["dflash with d-pace", "dspark gated"])
def test_a_round_runs_no_more_slots_than_it_drafts(world, name, non_causal):
    """As servers do: with slots that see those behind them a first draft of K = 1 is another than one of K = 3, and
    replay of each K is what live does with that K."""
    model = trained(world, attrs.evolve(VARIANTS[name], sliding_window_non_causal=non_causal))
    batch = {key: world.row(0)[key] for key in ("hidden_states", "input_ids", "position_ids", "document_ids")}
    one, three = (list(model.replay(**batch, num_speculative_tokens=k)) for k in (1, 3))
    assert (len(one), len(three)) == (1, 3)
    assert torch.allclose(one[0], three[0], atol=1e-5) is not non_causal
    rows = judged(world, range(6))
    for k, replayed in replay_each(model, rows, (1, 2, 3), temperature=0.0).items():
        decoded = [live(world, model, row, num_tokens=k) for row in rows]
        assert count_decoded(decoded, k).accepted.sum(0).tolist() == replayed.counts(k).accepted.sum(0).tolist()
