"""A sequence's cache whose last tokens can be taken back, also where layers keep a running state instead of keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from speculators.errors import VerifierError
from speculators.verifier.capture import cache_name

# Of a linear-attention layer, as transformers' caches name them: {index: tensor, or None before the first token}.
STATES = ("conv_states", "recurrent_states")

Mark = list[dict[str, Any]]


def is_recurrent(model: Any) -> bool:
    """Returns whether some layers keep a running state, which cannot be cropped as keys can."""
    return any(name in vars(layer) for layer in DynamicCache(config=model.config).layers for name in STATES)


def new_cache(model: Any, *, recurrent: bool) -> DynamicCache:
    """Returns an empty cache; `recurrent` as `is_recurrent` says."""
    # Without a config each layer's cache keeps all keys and can be cropped; a sliding window is in the mask.
    return DynamicCache(config=model.config) if recurrent else DynamicCache()


def mark(cache: DynamicCache) -> Mark:
    """Returns what `rewind` needs: copies of the running states. Keys are never written to, and so not copied."""
    return [_copy(vars(layer)) for layer in cache.layers]


def rewind(cache: DynamicCache, to: Mark) -> None:
    """Makes the cache what it was when `to` was marked."""
    for layer, held in zip(cache.layers, to, strict=True):
        vars(layer).update(_copy(held))


def _copy(held: dict[str, Any]) -> dict[str, Any]:
    return {name: _states(value) if isinstance(value, dict) else value for name, value in held.items()}


def _states(states: dict[int, Any]) -> dict[int, Any]:
    return {key: state.clone() if isinstance(state, torch.Tensor) else state for key, state in states.items()}


@torch.inference_mode()
def check_continues(model: Any) -> None:
    """Checks that a forward of several tokens goes on from the running states, which some architectures then ignore.

    Raises:
        VerifierError: other states before it change nothing.
    """
    cache = new_cache(model, recurrent=True)
    tokens = torch.arange(4, device=model.device)

    def run(places: slice) -> torch.Tensor:
        options = {"use_cache": True, cache_name(model): cache}
        return model(input_ids=tokens[None, places], position_ids=tokens[None, places], **options).logits[0, -1]

    run(slice(0, 2))
    before = mark(cache)
    wanted = run(slice(2, 4))
    for name in STATES:
        rewind(cache, before)
        states = [state for layer in cache.layers for state in vars(layer).get(name, {}).values() if state is not None]
        for state in states:
            state.zero_()
        if states and torch.equal(run(slice(2, 4)), wanted):
            raise VerifierError(
                f"{type(model).__name__}: transformers runs several tokens at once without the states of those before,"
                " so it can neither score drafts nor draft",
                hint="training with it works; measure it in a server",
            )
