"""The layer of multi-token prediction, built like a plain decoder's or like that of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn
from transformers.activations import ACT2FN

from speculators.models.base_components import MLP, Attend, Attention, Shape
from speculators.models.mtp.kinds import kind_of
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import CosSin, rotate


class OffsetNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms [..., size] and returns the weight's dtype; see `RMSNorm`."""
        return nn.functional.rms_norm(x.to(self.weight.dtype), (len(self.weight),), 1 + self.weight, self.eps)


class GatedAttention(Attention):
    """Attention whose query projection also yields a gate [R, heads * d] for its output; norms multiply by 1 + w."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.hidden_size)
        self.q_proj = nn.Linear(
            shape.hidden_size, 2 * shape.num_attention_heads * shape.head_dim, bias=shape.attention_bias
        )
        self.q_norm = OffsetNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = OffsetNorm(shape.head_dim, shape.rms_norm_eps)

    def queries_and_gate(self, x: torch.Tensor, cos_sin: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects [R, H] to rotated queries [R, heads, d] and the gate [R, heads * d], in 0..1."""
        # Query and gate of one head lie side by side: [R, heads, 2 d].
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return rotate(self.q_norm(q).to(q.dtype), cos_sin), torch.sigmoid(gate.flatten(1))


class Experts(nn.Module):
    """The routed experts: gate and up projections [E, 2I, H] and down projections [E, H, I] in one tensor each."""

    def __init__(self, decoder: dict[str, Any]) -> None:
        super().__init__()
        count, inner, size = (decoder[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.empty(count, size, inner))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.act = ACT2FN[decoder["hidden_act"]]

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sums the weighted outputs of each row's experts, [R, H].

        Args:
            x: [R, H].
            chosen: [R, k] int64, the experts of each row.
            weights: [R, k].
        """
        # Sort the rows by expert; the ends of the groups stay on the device, so nothing waits for the host.
        grouped, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(grouped, experts, right=True, out_int32=True)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        up_weight, down_weight = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        # Repeat each row once per expert, then permute. A direct gather's gradient would add up where indices repeat,
        # in an order that depends on the device's timing.
        rows = x.to(dtype).repeat_interleave(chosen.shape[1], 0).index_select(0, order)
        gate, up = nn.functional.grouped_mm(rows, up_weight.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = nn.functional.grouped_mm(self.act(gate) * up, down_weight.transpose(1, 2), offs=ends)
        # Back to the rows' order before the sum: an index_add would sum in an order that depends on the device's
        # timing.
        out = out.index_select(0, order.argsort()).unflatten(0, chosen.shape)
        return (out * weights[..., None].to(dtype)).sum(1)


class MixtureOfExperts(nn.Module):
    """A router over experts, beside a shared expert with its own gate."""

    def __init__(self, decoder: dict[str, Any], shape: Shape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.top_k: int = decoder["num_experts_per_tok"]
        self.normalise: bool = decoder["norm_topk_prob"]
        self.gate = nn.Linear(size, decoder["num_experts"], bias=False)
        self.experts = Experts(decoder)
        shared = decoder["shared_expert_intermediate_size"]
        self.shared_expert = MLP(attrs.evolve(shape, intermediate_size=shared, mlp_bias=False))
        self.shared_expert_gate = nn.Linear(size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixes top-k and shared experts: [R, H] -> [R, H]."""
        weights, chosen = torch.softmax(self.gate(x).float(), -1).topk(self.top_k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return self.experts(x, chosen, weights) + shared


class MtpLayer(nn.Module):
    """Computes the next state from a state h and the next token's embedding e: norm(decoder(proj([norm(e); norm(h)]))).

    Args:
        decoder: `transformer_layer_config`.
    """

    def __init__(self, decoder: dict[str, Any]) -> None:
        super().__init__()
        kind = kind_of(decoder["model_type"])
        shape = Shape.of({**decoder, "model_type": kind.shape_of})
        size, eps = shape.hidden_size, shape.rms_norm_eps
        norm = OffsetNorm if kind.hybrid else RMSNorm
        self.hidden_layernorm, self.token_layernorm = norm(size, eps), norm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = norm(size, eps)
        self.self_attn = GatedAttention(shape) if kind.hybrid else Attention(shape, size)
        self.post_attention_layernorm = norm(size, eps)
        self.mlp = MixtureOfExperts(decoder, shape) if kind.experts else MLP(shape)
        self.final_layernorm = norm(size, eps)

    def forward(
        self,
        state: torch.Tensor,
        embeddings: torch.Tensor,
        cos_sin: CosSin,
        attend: Attend,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            state: [S, H], the verifier's normed last states or this layer's own output.
            embeddings: [S, H] of the tokens that follow.
            cos_sin: of the S positions.
            attend: attention over this call's queries, keys and values and over what the caller has cached.
            rows: [R] rows to compute the output of, None for all; all S rows give keys.

        Returns:
            [R, H].
        """
        # Embedding first, as in Qwen3-Next's checkpoints.
        both = torch.cat((self.token_layernorm(embeddings), self.hidden_layernorm(state)), dim=-1)
        residual = self.input_proj(both)
        inputs = self.input_layernorm(residual)
        k, v = self.self_attn.keys_values(inputs, cos_sin)
        if rows is not None:
            inputs, residual = inputs.index_select(0, rows), residual.index_select(0, rows)
            cos_sin = (cos_sin[0][rows], cos_sin[1][rows])
        if isinstance(self.self_attn, GatedAttention):
            q, gate = self.self_attn.queries_and_gate(inputs, cos_sin)
            mixed = attend(q, k, v).flatten(1) * gate
        else:
            mixed = attend(self.self_attn.queries(inputs, cos_sin), k, v).flatten(1)
        x = residual + self.self_attn.o_proj(mixed)
        return self.final_layernorm(x + self.mlp(self.post_attention_layernorm(x)))
