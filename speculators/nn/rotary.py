"""Rotary position embedding of the draft's decoder: the verifier's own kind, from transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CosSin = tuple[torch.Tensor, torch.Tensor]


class Rotary(nn.Module):
    """Cosines and sines of positions.

    The frequencies (default, linear, dynamic, yarn, llama3, longrope; partial factor) are transformers' own, made from
    `rope_parameters`, since a draft whose rotary layout differs from its verifier's trains well and serves at 1.0.

    Args:
        decoder: `transformer_layer_config` of the speculator.
    """

    frequencies: torch.Tensor

    def __init__(self, decoder: dict[str, Any]) -> None:
        super().__init__()
        known = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
        rope, sizes = dict(decoder["rope_parameters"]), {name: decoder[name] for name in known}
        if rope.get("rope_type", "default") == "default":
            # Llama's default kind, unlike the others, does not read the partial factor.
            sizes["head_dim"] = int(sizes["head_dim"] * rope.get("partial_rotary_factor", 1.0))
        config = LlamaConfig(rope_parameters=rope, **sizes)
        kinds = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        # longrope's short or long factors, as vLLM takes them: by the longest sequence that there may be. transformers
        # asks for the longest of a call, by which one document of a packed row would turn all others.
        make = kinds[config.rope_parameters["rope_type"]]
        frequencies, self.scaling = make(config, seq_len=config.max_position_embeddings)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> CosSin:
        """[R] int64 -> cos and sin [R, 1, rotary size] in float32."""
        angles = positions[:, None, None].float() * self.frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Rotates the first components of each head; x [R, heads, d], the rest passes where the rotary size is below d."""
    cos, sin = cos_sin
    size = cos.shape[-1]
    turned = x[..., :size]
    half = size // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    rotated = (turned * cos + swapped * sin).to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)
