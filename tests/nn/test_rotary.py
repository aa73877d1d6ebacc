"""The rotary embedding is the verifier's own kind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding, apply_rotary_pos_emb

from speculators.nn.rotary import Rotary, rotate

KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
def test_heads_are_rotated_in_part_for_every_kind(kind, partial):
    """The partial factor holds for the default kind, too: an architecture that has one rotates the same components."""
    rope = {**KINDS[kind], "rope_theta": 10000.0, "partial_rotary_factor": partial}
    decoder = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
    }
    theirs = Qwen3NextRotaryEmbedding(AutoConfig.for_model("qwen3_next", **decoder))
    x, positions = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0)), torch.arange(7) * 50
    q = x.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb(q, q, *theirs(q, positions[None]))
    found = rotate(x, Rotary(decoder)(positions))
    assert torch.allclose(found, wanted[0].transpose(0, 1), atol=1e-6)
    assert torch.equal(found[..., int(16 * partial) :], x[..., int(16 * partial) :])
