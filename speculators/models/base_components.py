"""Decoder layers that algorithms build from: Llama's, and Qwen3's with its per-head norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from transformers.activations import ACT2FN

from speculators.errors import ContractError
from speculators.facts import VerifierFacts
from speculators.nn.cache import AttendAt
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import CosSin, rotate
from speculators.nn.vocab import set_vocab
from speculators.verifier.weights import VerifierHead, load_embeddings, load_head

# Takes queries [R, heads, d], keys and values [S, kv_heads, d] of this call; gives the output [R, heads, d].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def take_over(
    model: Any, verifier_config: VerifierFacts, kwargs: Mapping[str, Any], *, head_trainable: bool = False
) -> VerifierHead | None:
    """Gives a draft model its vocabulary and the verifier's embeddings, head rows and training target.

    Args:
        model: has `embed_tokens`, `lm_head` and `target_head`.
        kwargs: training kwargs; without weights where their `verifier_name_or_path` is None.
        head_trainable: the head is trained, and so a float32 copy.

    Returns:
        The verifier's head in the file's dtype, None without weights.
    """
    rows = set_vocab(model, kwargs["t2d"], kwargs["d2t"])
    if kwargs["verifier_name_or_path"] is None:
        return None
    folder = Path(kwargs["verifier_name_or_path"])
    # What stays frozen keeps the file's dtype: a float32 copy of a bf16 embedding is memory without a use.
    head = load_head(folder, verifier_config, rows=rows, dtype=None)
    model.embed_tokens.weight.data = load_embeddings(folder)
    model.lm_head.weight.data = head.weight.to(torch.float32, copy=True) if head_trainable else head.weight
    # In the compute dtype: the target's logits are as much work as a depth of the draft's.
    model.target_head = head.to(getattr(torch, kwargs["dtype"]))
    return head


HEAD_NORMS = {"llama": False, "qwen3": True}


@attrs.frozen
class Shape:
    """Sizes and switches of one draft decoder layer, read from `transformer_layer_config`."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    head_norms: bool

    @classmethod
    def of(cls, decoder: dict[str, Any]) -> Shape:
        """Raises ContractError for a `model_type` that no layer here implements."""
        kind = decoder["model_type"]
        if kind not in HEAD_NORMS:
            raise ContractError(f"no draft decoder layer of type {kind!r}", hint=f"there are: {', '.join(HEAD_NORMS)}")
        names = [field.name for field in attrs.fields(cls) if field.name != "head_norms"]
        return cls(**{name: decoder[name] for name in names}, head_norms=HEAD_NORMS[kind])


class Attention(nn.Module):
    """Projections of an attention; where its keys come from is the caller's business.

    Args:
        shape: sizes.
        input_size: width of the input, 2H where it is a token embedding beside a state.
    """

    def __init__(self, shape: Shape, input_size: int) -> None:
        super().__init__()
        heads, kv_heads, size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        bias = shape.attention_bias
        self.head_dim = size
        self.q_proj = nn.Linear(input_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, shape.hidden_size, bias=bias)
        if shape.head_norms:
            self.q_norm = RMSNorm(size, shape.rms_norm_eps)
            self.k_norm = RMSNorm(size, shape.rms_norm_eps)
        self.head_norms = shape.head_norms

    def queries(self, x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """[R, input] -> rotated queries [R, heads, d]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.q_norm(q).to(q.dtype) if self.head_norms else q, cos_sin)

    def keys_values(self, x: torch.Tensor, cos_sin: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, input] -> rotated keys and values, [S, kv_heads, d] each."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(k).to(k.dtype) if self.head_norms else k, cos_sin), v


class MLP(nn.Module):
    """The gated feed-forward of Llama and Qwen3."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)
        self.act = ACT2FN[shape.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] -> [R, H]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One decoder layer; the first one of a chain drafter may read a token embedding beside the state.

    Args:
        shape: sizes.
        with_embeddings: attend over [norm(e); norm(h)] (2H) instead of norm(h).
        norm_before_residual: with embeddings, the residual is the normed state.
    """

    def __init__(self, shape: Shape, *, with_embeddings: bool = False, norm_before_residual: bool = False) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        if with_embeddings:
            self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = Attention(shape, 2 * size if with_embeddings else size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(shape)
        self.norm_before_residual = norm_before_residual

    def forward(
        self,
        hidden: torch.Tensor,
        cos_sin: CosSin,
        attend: Attend,
        *,
        embeddings: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            hidden: [S, H] states.
            cos_sin: of the S positions.
            attend: the attention over this call's queries, keys and values and whatever the caller has cached.
            embeddings: [S, H] token embeddings, for the layer that reads them.
            rows: [R] the rows whose output is wanted; all S give keys. None for all.

        Returns:
            [R, H].
        """
        if embeddings is None:
            inputs, residual = self.input_layernorm(hidden), hidden
        else:
            normed = self.hidden_norm(hidden)
            inputs = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
            residual = normed if self.norm_before_residual else hidden
        k, v = self.self_attn.keys_values(inputs, cos_sin)
        if rows is not None:
            inputs, residual = inputs.index_select(0, rows), residual.index_select(0, rows)
            cos_sin = (cos_sin[0][rows], cos_sin[1][rows])
        q = self.self_attn.queries(inputs, cos_sin)
        hidden = residual + self.self_attn.o_proj(attend(q, k, v).flatten(1))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def run_layers(
    layers: Iterable[nn.Module],
    state: torch.Tensor,
    cos_sin: CosSin,
    attend: AttendAt,
    *,
    embeddings: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs `DecoderLayer`s one after the other; the first alone reads `embeddings`. Arguments and result as of one."""
    layers = list(layers)
    for index, layer in enumerate(layers):
        # Only the last layer may leave rows out: the one above it needs all of them for its keys.
        wanted = rows if index == len(layers) - 1 else None
        state = layer(state, cos_sin, partial(attend, index), embeddings=embeddings, rows=wanted)
        embeddings = None
    return state
