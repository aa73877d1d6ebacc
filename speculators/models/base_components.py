"""What algorithms build from: embeddings and head around a draft, and decoder layers of Llama's and Qwen3's kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from transformers.activations import ACT2FN

from speculators.errors import ContractError
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.nn.cache import AttendAt
from speculators.nn.few_rows import FewRowsLayer, FewRowsLinear, FewRowsNorm, suits
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import CosSin, Rotary, rotate
from speculators.nn.vocab import register_vocab, set_vocab
from speculators.verifier.weights import VerifierHead, load_embeddings, load_head

# Takes queries [R, heads, d], keys and values [S, kv_heads, d] of this call; gives the output [R, heads, d].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class HeadedModel(SpeculatorModel):
    """A draft model between the verifier's embeddings and a head over the draft vocabulary.

    `__init__` of a subclass calls `add_embeddings` first and `add_head` last, with its own modules in between. The
    order decides which random numbers each parameter starts with.

    Attributes:
        vocab_size: V of the verifier.
        draft_vocab_size: D.
        target_head: the verifier's, for training; None in a model that was loaded to draft.
        scale: factor of the attention's scores.
        window: sliding window of the attention, or None.
    """

    not_saved = ("target_head.", "rotary.")
    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    rotary: Rotary
    vocab_size: int
    draft_vocab_size: int
    target_head: VerifierHead | None
    scale: float
    window: int | None

    def add_embeddings(self) -> None:
        """Sets the sizes of both vocabularies and makes the frozen token embeddings [V, H]."""
        decoder = self.config.transformer_layer_config
        self.vocab_size = decoder["vocab_size"]
        self.draft_vocab_size = self.config.draft_vocab_size or self.vocab_size
        self.embed_tokens = nn.Embedding(self.vocab_size, decoder["hidden_size"]).requires_grad_(False)

    def add_head(self, *, trainable: bool = False) -> None:
        """Makes the head [D, H], the vocabulary maps where D < V, and the rotary embedding."""
        decoder = self.config.transformer_layer_config
        self.lm_head = nn.Linear(decoder["hidden_size"], self.draft_vocab_size, bias=False).requires_grad_(trainable)
        register_vocab(self, self.vocab_size, self.draft_vocab_size)
        self.rotary = Rotary(decoder)
        self.target_head = None
        # Attention settings that chains, blocks and drafters share; a block model narrows the window.
        self.scale = decoder["head_dim"] ** -0.5
        self.window = decoder.get("sliding_window")

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Projects states [R, H] to the draft vocabulary: [R, D] float32."""
        return self.lm_head(states.to(self.lm_head.weight.dtype)).float()


def target_logits(head: VerifierHead | None, states: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """Gives the verifier's logits [C, D] of a slice of N places at a time, from its last states [N, H].

    Raises:
        ContractError: `head` is None, as in a model that was loaded to draft.
    """
    if head is None:
        raise ContractError(
            "this model was loaded to draft: it lacks the verifier's head, which gives the training target",
            hint="build it with from_training_args, as `spec run` does; init_from starts it from saved weights",
        )
    return lambda chunk: head.logits(states[chunk])


def at_temperature(logits: Callable[[slice], torch.Tensor], temperature: float) -> Callable[[slice], torch.Tensor]:
    """Gives logits [C, D] of the verifier's distribution at a temperature: softmax(logits / temperature)."""
    if temperature == 1.0:
        return logits
    # In float32: the quotient of bf16 logits would be rounded once more.
    return lambda chunk: logits(chunk).float() / temperature


def same_kwargs(kwargs: Mapping[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Picks what `forward` receives besides the batch, the same in training and validation."""
    chosen = {name: kwargs[name] for name in names}
    return chosen, chosen


def take_over(
    model: Any, verifier_config: VerifierFacts, kwargs: Mapping[str, Any], *, head_trainable: bool = False
) -> VerifierHead | None:
    """Gives a draft model its vocabulary and the verifier's embeddings, head rows and training target.

    Args:
        model: has `embed_tokens`, `lm_head` and `target_head`.
        kwargs: training kwargs; a `verifier_name_or_path` of None leaves the weights as they are.
        head_trainable: the head is trained, and therefore a float32 copy.

    Returns:
        The verifier's head in the file's dtype, or None without weights.
    """
    rows = set_vocab(model, kwargs["t2d"], kwargs["d2t"])
    if kwargs["verifier_name_or_path"] is None:
        return None
    folder = Path(kwargs["verifier_name_or_path"])
    # Frozen tensors keep the file's dtype: a float32 copy of a bf16 embedding would only take memory.
    head = load_head(folder, verifier_config, rows=rows, dtype=None)
    model.embed_tokens.weight.data = load_embeddings(folder)
    model.lm_head.weight.data = head.weight.to(torch.float32, copy=True) if head_trainable else head.weight
    # In the compute dtype: the target's logits cost as much as those of one draft depth.
    model.target_head = head.to(getattr(torch, kwargs["dtype"]))
    return head


HEAD_NORMS = {"llama": False, "qwen3": True}


@attrs.frozen
class Shape:
    """Sizes and switches of one draft decoder layer, named as in `transformer_layer_config`.

    Attributes:
        head_norms: queries and keys of each head pass an RMSNorm, as in Qwen3.
    """

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
        """Reads `transformer_layer_config`.

        Raises:
            ContractError: no layer of this module implements its `model_type`.
        """
        kind = decoder["model_type"]
        if kind not in HEAD_NORMS:
            raise ContractError(f"no draft decoder layer of type {kind!r}", hint=f"available: {', '.join(HEAD_NORMS)}")
        names = [field.name for field in attrs.fields(cls) if field.name != "head_norms"]
        return cls(**{name: decoder[name] for name in names}, head_norms=HEAD_NORMS[kind])


class Attention(nn.Module):
    """The projections of an attention layer; the caller decides which keys its queries see.

    Args:
        input_size: width of the input: H, or 2H for a token embedding beside a state.
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
        """Projects and rotates queries: [R, input] -> [R, heads, d]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        # Norm before rotation, as Qwen3 does; its weight may be float32 while q is bf16.
        return rotate(self.q_norm(q).to(q.dtype) if self.head_norms else q, cos_sin)

    def keys_values(self, x: torch.Tensor, cos_sin: CosSin) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects keys, which are rotated, and values: [S, input] -> [S, kv_heads, d] each."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(k).to(k.dtype) if self.head_norms else k, cos_sin), v


class MLP(nn.Module):
    """The gated feed-forward of Llama and Qwen3: down(act(gate(x)) * up(x))."""

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
    """One pre-norm decoder layer; the first of a chain drafter may read a token embedding beside the state.

    Args:
        with_embeddings: attention reads [norm(e); norm(h)] (2H) instead of norm(h).
        norm_before_residual: with embeddings, the residual is norm(h) instead of h.
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
            attend: attention over this call's queries, keys and values and over what the caller has cached.
            embeddings: [S, H] token embeddings, for the layer that reads them.
            rows: [R] rows to compute the output of, None for all; all S rows give keys.

        Returns:
            [R, H].
        """
        if embeddings is None:
            # An ordinary pre-norm layer.
            inputs, residual = self.input_layernorm(hidden), hidden
        else:
            # EAGLE-3's first layer: attention reads [norm(e); norm(h)], the residual is h or norm(h) alone.
            normed = self.hidden_norm(hidden)
            inputs = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
            residual = normed if self.norm_before_residual else hidden
        # Keys first, of all S rows; from there on only the rows that the caller asks for.
        k, v = self.self_attn.keys_values(inputs, cos_sin)  # [S, kv_heads, d]
        if rows is not None:
            inputs, residual = inputs.index_select(0, rows), residual.index_select(0, rows)
            cos_sin = (cos_sin[0][rows], cos_sin[1][rows])
        q = self.self_attn.queries(inputs, cos_sin)  # [R, heads, d]
        hidden = residual + self.self_attn.o_proj(attend(q, k, v).flatten(1))  # [R, H]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def layers_with_embeddings(shape: Shape, count: int, *, norm_before_residual: bool) -> nn.ModuleList:
    """Makes EAGLE-3's decoder: the first layer reads token embeddings beside the state, the others are ordinary."""
    first = DecoderLayer(shape, with_embeddings=True, norm_before_residual=norm_before_residual)
    return nn.ModuleList([first, *(DecoderLayer(shape) for _ in range(1, count))])


def run_layers(
    layers: Iterable[nn.Module],
    state: torch.Tensor,
    cos_sin: CosSin,
    attend: AttendAt,
    *,
    embeddings: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs `DecoderLayer`s in turn, only the first with `embeddings`; arguments and result as of one layer."""
    layers = list(layers)
    for index, layer in enumerate(layers):
        # Only the last layer may skip rows: each one below it has to give the next layer all of its keys.
        last_rows = rows if index == len(layers) - 1 else None
        state = layer(state, cos_sin, partial(attend, index), embeddings=embeddings, rows=last_rows)
        embeddings = None
    return state


def for_few_rows(module: Any) -> Any:
    """Copies a draft model in evaluation mode to its form for few rows, as drafting runs it; see `nn.few_rows`.

    Tensors that keep their layout are shared. On devices that do not gain from other layouts it is the model itself.
    """
    first = next(module.parameters(), None)
    if first is None or not suits(first):
        return module
    return _for_few_rows(module)


def _for_few_rows(module: nn.Module) -> nn.Module:
    if type(module) is nn.Linear:
        return FewRowsLinear([module]) if suits(module.weight) else module
    if type(module) is RMSNorm:
        return FewRowsNorm(module)
    if type(module) is DecoderLayer and _joins(module):
        return FewRowsLayer(module)
    children = {name: _for_few_rows(child) for name, child in module.named_children()}
    if all(children[name] is child for name, child in module.named_children()):
        return module
    clone = copy(module)
    clone._modules = {**module._modules, **children}
    return clone


def _joins(layer: DecoderLayer) -> bool:
    """Whether the layer's projections can be joined: one dtype."""
    return len({parameter.dtype for parameter in layer.parameters() if parameter.ndim == 2}) == 1
