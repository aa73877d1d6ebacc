"""Captures residual streams of a transformers model by hooks, without computing logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from speculators.errors import VerifierError
from speculators.verifier.architecture import trunk


class Capture:
    """Collects the streams at `layer_ids` from one forward.

    Args:
        model: a transformers causal language model.
        layers: its decoder layers, N of them.
        layer_ids: id l is the stream entering layer l, id N the last layer's output before the final norm.

    Raises:
        VerifierError: an id is not in 0..N.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, layer_ids: Sequence[int]) -> None:
        if outside := [i for i in layer_ids if not 0 <= i <= len(layers)]:
            raise VerifierError(f"layer ids must be in 0..{len(layers)}, got {outside}")
        self._decoder = trunk(model)
        self._layers = layers
        self._ids = tuple(layer_ids)
        self._states: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def run(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Runs `input_ids` [B, S]; returns the streams in the order of `layer_ids`, each [B, S, H].

        Args:
            position_ids: [B, S], where they restart within a row; None for 0..S-1.
        """
        self._states = {}
        handles = [self._watch(layer_id) for layer_id in {*self._ids}]
        try:
            # Third-party models need not take positions.
            positions = {} if position_ids is None else {"position_ids": position_ids}
            # The decoder without the head: logits are never computed.
            self._decoder(input_ids=input_ids, use_cache=False, **positions)
        finally:
            for handle in handles:
                handle.remove()
        return [self._states[layer_id] for layer_id in self._ids]

    def _watch(self, layer_id: int) -> Any:
        return watch(self._layers, layer_id, lambda state: self._keep(layer_id, state))

    def _keep(self, layer_id: int, state: torch.Tensor) -> None:
        self._states[layer_id] = state


def watch(layers: nn.ModuleList, layer_id: int, keep: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Calls `keep` with a residual stream whenever it is computed; id l enters layer l, id N leaves the last layer."""

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def leaving(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    if layer_id < len(layers):
        return layers[layer_id].register_forward_pre_hook(entering, with_kwargs=True)
    return layers[-1].register_forward_hook(leaving)


def cache_name(model: Any) -> str:
    """Finds the name of the KV cache argument: transformers 5.24 renamed it, third-party models did not."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def takes_positions(model: Any) -> bool:
    """Whether a model's positions can be given; third-party models may count them themselves."""
    return "position_ids" in inspect.signature(trunk(model).forward).parameters


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, ...]]:
    """Groups indices so that each batch, padded to its longest, has at most `batch_tokens` tokens; shortest first."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            batches.append(tuple(batch))
            batch = []
        batch.append(index)
    return [*batches, tuple(batch)] if batch else batches


def batches_in_order(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, ...]]:
    """Groups indices so that the tokens of each batch, side by side, are at most `batch_tokens`."""
    batches: list[tuple[int, ...]] = []
    batch, room = list[int](), batch_tokens
    for index, length in enumerate(lengths):
        if batch and length > room:
            batches.append(tuple(batch))
            batch, room = [], batch_tokens
        batch.append(index)
        room -= length
    return [*batches, tuple(batch)] if batch else batches
