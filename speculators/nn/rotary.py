"""Rotary position embedding of the draft's decoder, of the verifier's kind, by transformers' own formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CosSin = tuple[torch.Tensor, torch.Tensor]


class Rotary(nn.Module):
    """Computes cosines and sines of positions.

    The frequencies (default, linear, dynamic, yarn, llama3, longrope; partial factor) come from transformers' functions
    and `rope_parameters`. Servers use the same: a draft with other frequencies trains well, and is then rejected when
    served, at an acceptance length of 1.0.

    Args:
        decoder: `transformer_layer_config` of the speculator.
    """

    frequencies: torch.Tensor

    def __init__(self, decoder: dict[str, Any]) -> None:
        super().__init__()
        known = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
        rope, sizes = dict(decoder["rope_parameters"]), {name: decoder[name] for name in known}
        if rope.get("rope_type", "default") == "default":
            # Unlike the other kinds, Llama's default does not read the partial factor.
            sizes["head_dim"] = int(sizes["head_dim"] * rope.get("partial_rotary_factor", 1.0))
        config = LlamaConfig(rope_parameters=rope, **sizes)
        kinds = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        # longrope chooses between short and long factors by the longest possible sequence, as vLLM does. transformers
        # decides by the longest sequence of a call, where one document of a packed row would change all others.
        make = kinds[config.rope_parameters["rope_type"]]
        frequencies, self.scaling = make(config, seq_len=config.max_position_embeddings)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> CosSin:
        """Maps positions [R] int64 to cos and sin, [R, 1, rotary size] each, in float32."""
        angles = positions[:, None, None].float() * self.frequencies.float()
        # Hugging Face's layout: component i is rotated with component i + size / 2, not with its neighbour.
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Rotates the first components of each head of x [R, heads, d]; those beyond the rotary size pass unchanged."""
    cos, sin = cos_sin
    size = cos.shape[-1]
    turned = x[..., :size]
    half = size // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    rotated = (turned * cos + swapped * sin).to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)
