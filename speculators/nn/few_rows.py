"""Decoder layers laid out for a few rows at a time, as decoding on a CPU runs them.

A product of a few rows costs what reading its weight costs, and each call into torch costs microseconds. So q, k and v
are one product, as are gate and up, and weights lie in the order that the kernels read. The results are those of the
original layers up to rounding. benchmarks/RESULTS.md, "Products of few rows", has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from speculators.nn.rotary import CosSin, rotate

Activation = Callable[[torch.Tensor], torch.Tensor]
# Rows that bf16 weights are ordered for; products of more rows work, too.
_ROWS = 8


def suits(tensor: torch.Tensor) -> bool:
    """Whether products with this weight gain from the layouts: on a CPU, in float32 or, where it has them, bf16."""
    if tensor.device.type != "cpu":
        return False
    if tensor.dtype == torch.bfloat16:
        # On a CPU without the instructions oneDNN raises instead of computing more slowly.
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return tensor.dtype == torch.float32


class FewRowsLinear(nn.Module):
    """One product for linear layers that read the same input: their outputs lie side by side.

    Args:
        layers: of the same input width; all have a bias, or none has.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._packed = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        # A plain float32 product of a few rows is fastest with the weight column by column.
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._packed else weight.t().contiguous()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, input] -> [R, sum of the outputs]."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self._bias, "none", [], "")
        return x @ self.weight if self._bias is None else torch.addmm(self._bias, x, self.weight)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the product to `residual` [R, output]."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self._bias, "add")
        if self._bias is not None:
            residual = residual + self._bias
        return torch.addmm(residual, x, self.weight)


class FewRowsNorm(nn.Module):
    """An RMSNorm over the last dimension.

    Args:
        norm: this project's module or transformers'.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight.detach()
        self._share = 1 / len(self.weight)
        self._eps = torch.tensor(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms [..., size] and returns the weight's dtype."""
        # In float32, as the module itself; torch's rms_norm takes several times as long for a few rows.
        length = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, length, length, value=self._share).rsqrt_()
        return (x * scale).to(self.weight.dtype) * self.weight


def few_rows_norm(norm: nn.Module) -> nn.Module:
    """Makes the few-row form of an RMSNorm; what has no weight (an identity in a norm's place) stays as it is."""
    return FewRowsNorm(norm) if hasattr(norm, "weight") else norm


class FewRowsLayer(nn.Module):
    """A pre-norm decoder layer of Llama's or Qwen3's kind, this project's or transformers'.

    Args:
        layer: has `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`, and, if its attention reads
            token embeddings beside the states, `hidden_norm`.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim: int = attention.head_dim
        self._queries = attention.q_proj.out_features // self.head_dim
        self._keys = attention.k_proj.out_features // self.head_dim
        self._qkv = FewRowsLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = FewRowsLinear([attention.o_proj])
        self._gate_up = FewRowsLinear([mlp.gate_proj, mlp.up_proj])
        self._down = FewRowsLinear([mlp.down_proj])
        self._act: Activation = mlp.act if hasattr(mlp, "act") else mlp.act_fn
        self._input_norm = few_rows_norm(layer.input_layernorm)
        self._mlp_norm = few_rows_norm(layer.post_attention_layernorm)
        self._hidden_norm = few_rows_norm(layer.hidden_norm) if hasattr(layer, "hidden_norm") else None
        self._q_norm = few_rows_norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._k_norm = few_rows_norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self._sign = torch.ones(self.head_dim, dtype=attention.q_proj.weight.dtype)
        self._sign[: self.head_dim // 2] = -1
        self._normed_residual: bool = getattr(layer, "norm_before_residual", False)

    def forward(
        self,
        hidden: torch.Tensor,
        cos_sin: CosSin,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        embeddings: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer; arguments and result are those of `DecoderLayer.forward`."""
        assert rows is None, "decoding runs all rows"
        if embeddings is None:
            inputs, residual = self._input_norm(hidden), hidden
        else:
            assert self._hidden_norm is not None, "this layer reads no embeddings"
            normed = self._hidden_norm(hidden)
            inputs = torch.cat((self._input_norm(embeddings), normed), dim=-1)
            residual = normed if self._normed_residual else hidden
        qkv = self._qkv(inputs).unflatten(-1, (-1, self.head_dim))  # [S, heads + 2 kv_heads, d]
        both = self._queries + self._keys
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(qkv[:, : self._queries]), self._k_norm(qkv[:, self._queries : both])
            qk = torch.cat((q, k), dim=1)
        else:
            qk = qkv[:, :both]
        if cos_sin[0].shape[-1] == self.head_dim:
            cos, sin = (part.to(qk.dtype) for part in cos_sin)
            # As `rotate`: component i turns with component i + d / 2, whose sine is negative in the first half.
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin * self._sign)
        else:
            qk = rotate(qk, cos_sin)
        mixed = attend(qk[:, : self._queries], qk[:, self._queries :], qkv[:, both:])
        hidden = self._out.added_to(residual, mixed.flatten(1))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        return self._down.added_to(hidden, self._act(gate) * up)
