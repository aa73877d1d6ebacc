"""Runs a small verifier for a few rows on a CPU, where transformers spends a third of a token's time between products.

Only what is certain to be the same function takes this path: the decoder must have the structure of Llama's or Qwen3's,
and its logits and states must agree with the model's own on a few tokens. Everything else runs through transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from speculators.nn.cache import MANY_QUERIES, KeyBuffer, causal, widened
from speculators.nn.few_rows import FewRowsLayer, FewRowsLinear, FewRowsNorm, suits
from speculators.verifier.architecture import decoder_layers, trunk

# The joined weights are a second copy.
_LARGEST_BYTES = 4 << 30
# Children of a layer and of its attention and MLP that the joined layer computes; with any other it does not fit.
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
# Rotary embeddings that do not depend on a sequence's length.
_STATIC_ROTARY = ("default", "linear", "yarn", "llama3")
# Tokens that the functions are compared on, and how far they may differ in the mean, relative to the mean size:
# float32 sums in another order, and bf16 rounds every layer's output to 8 bits. SmolLM2 differs by 3e-6 and 2e-2; a
# layer whose function is another one by a tenth and more.
_CHECKED_TOKENS = 14
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

_known: WeakKeyDictionary[nn.Module, tuple[Any, FewRowsVerifier | None]] = WeakKeyDictionary()


def few_rows_verifier(model: Any) -> FewRowsVerifier | None:
    """Makes the model's few-row form, or finds it; None where transformers' own forward has to run."""
    version = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    if model not in _known or _known[model][0] != version:
        made = FewRowsVerifier(model) if _fits(model) else None
        _known[model] = version, made if made is not None and _agrees(made, model) else None
    return _known[model][1]


def _fits(model: Any) -> bool:
    """Whether the model has the structure of the joined layers."""
    weights = list(model.parameters())
    if sum(weight.nbytes for weight in weights) > _LARGEST_BYTES or {w.dtype for w in weights} != {model.dtype}:
        return False
    decoder = trunk(model)
    parts = all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb"))
    if not parts or not hasattr(model, "lm_head") or model.dtype not in _ALLOWED or not suits(weights[0]):
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    if getattr(decoder.rotary_emb, "rope_type", None) not in _STATIC_ROTARY:
        return False
    return all(_layer_fits(layer) for layer in decoder_layers(model))


def _layer_fits(layer: Any) -> bool:
    def children(module: Any) -> set[str]:
        # Without parameters a child is an activation or an identity.
        return {name for name, child in module.named_children() if any(True for _ in child.parameters())}

    if children(layer) != _LAYER or children(layer.mlp) != _MLP:
        return False
    attention = layer.self_attn
    if children(attention) - _HEAD_NORMS != _ATTENTION or not hasattr(attention, "head_dim"):
        return False
    linears = [getattr(attention, name) for name in _ATTENTION] + [getattr(layer.mlp, name) for name in _MLP]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return all(type(linear) is nn.Linear for linear in linears) and all(hasattr(n, "variance_epsilon") for n in norms)


class FewRowsVerifier:
    """A verifier's forward for one sequence, over keys in a `KeyBuffer`.

    Args:
        model: fits, as `few_rows_verifier` checks. It is not kept, so that both go when the model goes.

    Attributes:
        num_layers: of the verifier.
        vocab_size: rows of its embeddings.
    """

    def __init__(self, model: Any) -> None:
        decoder: Any = trunk(model)
        self._embeddings = decoder.embed_tokens.weight.detach()
        self._layers = [FewRowsLayer(layer) for layer in decoder_layers(model)]
        attention: Any = decoder_layers(model)[0].self_attn
        self._group: int = attention.q_proj.out_features // attention.k_proj.out_features
        self._scale: float = getattr(attention, "scaling", attention.head_dim**-0.5)
        self._norm = FewRowsNorm(decoder.norm)
        self._head = FewRowsLinear([model.lm_head])
        self._rotary = decoder.rotary_emb
        self.num_layers, self.vocab_size = len(self._layers), len(self._embeddings)

    @torch.inference_mode()
    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: KeyBuffer,
        *,
        start: int,
        layer_ids: Sequence[int] = (),
        mask: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs tokens [n] whose keys are written from place `start` on.

        Args:
            positions: [n] of the rotary embedding.
            layer_ids: the states to return, as of `CachedVerifier`.
            mask: [n, start + n] additive; None: causal.
            logits_to_keep: number of last tokens to compute logits of; 0 for all.

        Returns:
            Logits [n or logits_to_keep, V] and states [n, A*H].
        """
        hidden = torch.nn.functional.embedding(tokens, self._embeddings)
        cos, sin = self._rotary(hidden, positions[None])
        cos_sin = cos[0][:, None], sin[0][:, None]
        if mask is None and 1 < len(tokens) < MANY_QUERIES:
            mask = causal(len(tokens), start + len(tokens), hidden)
        # Made once, for all layers.
        wide = None if mask is None else widened(mask, self._group)
        streams = []
        for index, layer in enumerate(self._layers):
            streams.append(hidden)
            attend = functools.partial(keys.attend, index, start=start, mask=wide, scale=self._scale)
            hidden = layer(hidden, cos_sin, attend)
        streams.append(hidden)
        states = torch.cat([streams[layer] for layer in layer_ids], -1) if layer_ids else hidden[:, :0]
        return self._head(self._norm(hidden[-logits_to_keep:])), states


def _agrees(form: FewRowsVerifier, model: Any) -> bool:
    """Whether logits and last states are the model's own up to rounding, in one forward and token by token."""
    tokens = torch.arange(_CHECKED_TOKENS) * 37 % form.vocab_size
    caught: list[torch.Tensor] = []
    last = decoder_layers(model)[-1]
    hook = last.register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
    try:
        with torch.inference_mode():
            expected = model(input_ids=tokens[None], use_cache=False).logits[0]
    finally:
        hook.remove()
    keys, cut = KeyBuffer(), _CHECKED_TOKENS - 3
    pieces = [(0, cut), (cut, cut + 1), (cut + 1, _CHECKED_TOKENS)]
    got = [form(tokens[a:b], torch.arange(a, b), keys, start=a, layer_ids=(form.num_layers,)) for a, b in pieces]
    logits, states = (torch.cat(parts) for parts in zip(*got, strict=True))
    return _close(logits, expected) and _close(states, caught[0][0])


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (got.float() - expected.float()).abs().mean()
    return bool(difference <= _ALLOWED[expected.dtype] * expected.float().abs().mean())
