"""P-EAGLE: how many depths rows have, and its checkpoint; test_proof covers what every algorithm must do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from speculators.models.peagle import PEagleSpeculatorConfig
from speculators.models.peagle.core import Elements

from .proof import check_replay_equals_live, fit

VARIANTS = {
    "two layers": {"num_layers": 2},
    "norm before residual": {"norm_before_residual": True, "norm_before_fc": True},
    "a window": {"decoder": {"sliding_window": 6}},
    "qwen3 layers": {"decoder": {"model_type": "qwen3"}},
}


def test_a_depth_keeps_its_share_of_the_anchors_above_it():
    """Depth d keeps max(0.7 ** d, 0.2) of 400 seeds, and each depth only rows that the depth before keeps."""
    torch.manual_seed(0)
    drawn = Elements.draw(torch.arange(1000), 8, keep=0.7, keep_min=0.2, at_most=400)
    kept = [int((drawn.counts >= depth).sum()) for depth in range(1, 8)]
    assert kept == [280, 196, 137, 96, 80, 80, 80]
    assert (drawn.anchors.diff() > 0).all()
    assert drawn.rows.tolist() == [a for a, n in zip(drawn.anchors, drawn.counts, strict=True) for _ in range(n)]
    assert drawn.depths.tolist() == [d for n in drawn.counts for d in range(1, n + 1)]


def test_what_is_drawn_follows_from_the_seed():
    """The same seed draws the same anchors, another seed others."""

    def draw(seed):
        torch.manual_seed(seed)
        return Elements.draw(torch.arange(300), 8, keep=0.7, keep_min=0.2, at_most=100).anchors

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_equals_live_round_for_round(world, name):
    """Every variant of the layer, partly trained by drawn depths, accepts live what replay says."""
    model, kwargs = world.build(PEagleSpeculatorConfig(num_depths=4, **VARIANTS[name]), 256)
    fit(model, kwargs, world.row(0, 1, 2, 3), steps=60)
    check_replay_equals_live(world, model.eval())


def test_fewer_anchors_give_the_same_loss_in_the_mean(world):
    """The loss over drawn anchors equals in the mean the loss over all of them."""
    model, kwargs = world.build(PEagleSpeculatorConfig(num_depths=4, keep=1.0), 256)
    row = world.row(0, 1, 2, 3)
    whole = float(model(**row, **kwargs)[1].detach())
    torch.manual_seed(2)
    drawn = [float(model(**row, **{**kwargs, "max_anchors": 24})[1].detach()) for _ in range(60)]
    # Standard deviation of one draw is some 3%; of the mean of 60, 0.4%.
    assert sum(drawn) / len(drawn) == pytest.approx(whole, rel=0.02)


def test_the_checkpoint_has_the_served_names(world, tmp_path):
    """The checkpoint has EAGLE-3's tensors, and the learnt state of places that the verifier has not seen."""
    world.build(PEagleSpeculatorConfig(), 256)[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert list(tensors["mask_hidden"].shape) == [1, 1, 96]
    assert {"fc.weight", "layers.0.hidden_norm.weight", "embed_tokens.weight", "lm_head.weight", "d2t"} <= set(tensors)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["PEagleSpeculator"]
    assert config["norm_before_residual"] is False
    assert config["mask_token_id"] == world.engine.facts.vocab_size - 1
