"""The draft's rotary embedding equals the verifier's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding, apply_rotary_pos_emb

from speculators.nn.rotary import Rotary, rotate

KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


def decoder_of(rope: dict) -> dict:
    return {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partial", [1.0, 0.5, 0.25])
def test_heads_are_rotated_in_part_for_every_kind(kind, partial):
    """The partial factor also holds for the default kind: the draft rotates the same components as the verifier."""
    rope = {**KINDS[kind], "rope_theta": 10000.0, "partial_rotary_factor": partial}
    decoder = decoder_of(rope)
    theirs = Qwen3NextRotaryEmbedding(AutoConfig.for_model("qwen3_next", **decoder))
    x, positions = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0)), torch.arange(7) * 50
    q = x.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb(q, q, *theirs(q, positions[None]))
    found = rotate(x, Rotary(decoder)(positions))
    assert torch.allclose(found, wanted[0].transpose(0, 1), atol=1e-6)
    assert torch.equal(found[..., int(16 * partial) :], x[..., int(16 * partial) :])


@pytest.mark.parametrize(("original", "like"), [(128, "long"), (512, "short")])
def test_a_long_document_turns_no_short_one(original, like):
    """longrope's factors follow from the config alone, long ones where it allows more than the original length: a row
    of packed documents, a live round and a server turn a position alike."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": original,
    }
    decoder = decoder_of(rope)
    rotary, short = Rotary(decoder), torch.arange(20)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**decoder))
    # Theirs takes the long factors where a position of the call is past the original length.
    wanted, _ = theirs(torch.empty(0), torch.cat((short, torch.tensor([500 if like == "long" else 0])))[None])
    assert torch.equal(rotary(short)[0][:, 0], wanted[0, :20])
    assert torch.equal(rotary(torch.cat((short, torch.arange(500))))[0][:20], rotary(short)[0])
