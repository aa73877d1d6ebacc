"""Takes the last tokens of a sequence's cache back, also in layers that keep a running state instead of keys.

Keys of rejected drafts are cropped. A running state (linear attention, Mamba) has no place to crop at: it is copied
before drafting and restored after a rejection.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from speculators.errors import VerifierError
from speculators.verifier.capture import cache_name

# The running states of a linear-attention layer, as transformers' caches name them: {index: tensor, None before a
# token}.
STATES = ("conv_states", "recurrent_states")

Mark = list[dict[str, Any]]


def is_recurrent(model: Any) -> bool:
    """Whether some layers keep a running state, which cannot be cropped as keys can."""
    return any(name in vars(layer) for layer in DynamicCache(config=model.config).layers for name in STATES)


def new_cache(model: Any, *, recurrent: bool) -> DynamicCache:
    """Makes an empty cache; `recurrent` is the answer of `is_recurrent`."""
    # Without a config each layer keeps all keys and can be cropped; a sliding window is then applied by the mask.
    return DynamicCache(config=model.config) if recurrent else DynamicCache()


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


def _states(states: dict[int, Any]) -> dict[int, Any]:
    return {key: state.clone() if isinstance(state, torch.Tensor) else state for key, state in states.items()}


@torch.inference_mode()
def check_continues(model: Any) -> None:
    """Checks that a forward of several tokens continues from the running states, which some architectures ignore.

    Raises:
        VerifierError: changing the states changes no logit.
    """
    cache = new_cache(model, recurrent=True)
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
