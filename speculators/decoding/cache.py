"""Builds a verifier's cache from its config, and takes the last tokens of a sequence back from it.

Keys of rejected drafts are cropped, an indexer's too. A running state (linear attention, Mamba) has no place to crop
at, and compressed keys cannot be cut token by token: such layers are copied before drafting and restored after a
rejection.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from speculators.errors import VerifierError
from speculators.verifier.capture import cache_name

# The running states of a linear-attention layer, as transformers' caches name them: {index: tensor, None before a
# token}.
STATES = ("conv_states", "recurrent_states")
# transformers' classes of layers that `crop` takes back token by token: one key for each token, an indexer's beside it,
# or none, where a layer reads another's keys. By name: older versions lack some.
_CROPPED = ("DynamicLayer", "DynamicIndexedLayer", "DummyLayer")

Mark = list[dict[str, Any]]


def is_recurrent(model: Any) -> bool:
    """Whether some layers keep what cannot be cropped token by token."""
    return not all(type(layer).__name__ in _CROPPED for layer in new_cache(model).layers)


def is_plain(model: Any) -> bool:
    """Whether each layer keeps the keys of all tokens and nothing else, so that single ones can be picked."""
    return all(type(layer) is DynamicLayer for layer in new_cache(model).layers)


def windows(model: Any) -> dict[str, int | None]:
    """Maps each kind of layer, as configs name it, to how many of the nearest keys it sees, its own among them.

    None means all. Each layer without a window counts as "full_attention".
    """
    kinds: dict[str, int | None] = {}
    for layer in DynamicCache(config=model.config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            kinds["sliding_attention"] = layer.sliding_window
        else:
            kinds["full_attention"] = None
    return kinds


def new_cache(model: Any) -> DynamicCache:
    """Makes an empty cache with the layers that the model's config asks for."""
    cache = DynamicCache(config=model.config)
    # A layer that forgets keys beyond its window cannot take tokens back: all keys are kept, and the mask applies the
    # window.
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def mark(cache: DynamicCache) -> Mark:
    """Copies the running states, for `rewind`. Keys are never overwritten, and therefore not copied."""
    return [_copy(vars(layer)) for layer in cache.layers]


def rewind(cache: DynamicCache, to: Mark) -> None:
    """Restores the cache to what it was when `to` was marked."""
    for layer, attributes in zip(cache.layers, to, strict=True):
        # A copy again: the same mark may be restored more than once, and layers write to their states.
        vars(layer).update(_copy(attributes))


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: _states(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def _states(states: dict[Any, Any]) -> dict[Any, Any]:
    return {key: state.clone() if isinstance(state, torch.Tensor) else state for key, state in states.items()}


@torch.inference_mode()
def check_continues(model: Any) -> None:
    """Checks that a forward of several tokens continues from the running states, which some architectures ignore.

    Raises:
        VerifierError: changing the states changes no logit.
    """
    cache = new_cache(model)
    tokens = torch.arange(4, device=model.device)

    def run(places: slice) -> torch.Tensor:
        options = {"use_cache": True, cache_name(model): cache}
        return model(input_ids=tokens[None, places], position_ids=tokens[None, places], **options).logits[0, -1]

    run(slice(0, 2))
    before = mark(cache)
    expected = run(slice(2, 4))
    for name in STATES:
        rewind(cache, before)
        states = [state for layer in cache.layers for state in vars(layer).get(name, {}).values() if state is not None]
        for state in states:
            state.zero_()
        if states and torch.equal(run(slice(2, 4)), expected):
            raise VerifierError(
                f"{type(model).__name__}: transformers ignores the running states when it runs several tokens at once,"
                " so this model can neither score drafts nor draft",
                hint="training with it works; measure the speculator in a server",
            )
