"""Generates the verifier's continuations in batches, with a KV cache that is written in place.

Unlike transformers' `generate`, it copies no keys at each token, and finished rows leave the batch
(benchmarks/perf/generate.py times both).
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import attrs
import torch
from attrs import field
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from speculators.config import positive
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.architecture import trunk
from speculators.verifier.capture import cache_name
from speculators.verifier.factors import by_factors, factors_for
from speculators.verifier.token_filter import filtered

Batch = tuple[tuple[int, ...], list[list[int]]]

# Finished rows leave the batch once at most this share is unfinished: each removal moves the other rows' keys.
KEPT_SHARE = 0.8


@attrs.frozen(kw_only=True)
class Sampling:
    """Settings of continuations.

    Attributes:
        max_new_tokens: for each prompt.
        temperature: 0 is greedy; above, the pure distribution at that temperature, of the tokens of `token_filter`.
        token_filter: tokens that may be sampled.
        seed: of the sampling.
        batch_size: prompts at once.
    """

    max_new_tokens: int = field(validator=positive)
    temperature: float = 0.0
    token_filter: TokenFilter = ALL_TOKENS
    seed: int = 0
    batch_size: int = field(default=32, validator=positive)


def generate_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    *,
    done: Container[int] = (),
    progress: Progress = ignore,
) -> Iterator[Batch]:
    """Continues prompts in batches of similar length; see `Engine.generate_batches`."""
    # Ordered by content: batches, and the samples in them, must not depend on the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    longest = [len(prompts[i]) + sampling.max_new_tokens for i in order]
    size, meter = sampling.batch_size, _Meter(len(prompts), sampling.max_new_tokens, progress)
    # No batch mixes prompts whose conversations get different rotary embeddings.
    groups = [[order[place] for place in group] for group in by_factors(longest, model)]
    batches = [tuple(group[start : start + size]) for group in groups for start in range(0, len(group), size)]
    for number, indices in enumerate(batches):
        if all(index in done for index in indices):
            meter.finish(len(indices), 0)
            continue
        batch = [prompts[i] for i in indices]
        with factors_for(model, max(map(len, batch)) + sampling.max_new_tokens):
            outputs = _continue(model, batch, sampling, stop_ids, number, meter)
        meter.finish(len(indices), sum(map(len, outputs)))
        yield indices, outputs


@torch.inference_mode()
def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    number: int,
    meter: _Meter,
) -> list[list[int]]:
    length, device = max(map(len, prompts)), model.device
    # Padded on the left, so that all answers start in the same column.
    ids = torch.tensor([[stop_ids[0]] * (length - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.tensor([length - len(p) for p in prompts], device=device)
    columns = torch.arange(length + sampling.max_new_tokens, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    generator = torch.Generator(device).manual_seed((sampling.seed * 1_000_003 + number) % 2**64)
    cache = _cache(model, len(columns))
    made = torch.empty(len(prompts), sampling.max_new_tokens, dtype=torch.int64, device=device)
    live = torch.arange(len(prompts), device=device)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)

    cache_is = cache_name(model)

    def inputs(first: int, stop: int) -> dict[str, Any]:
        """Arguments of the model for columns [first, stop), except the tokens."""
        return {
            "attention_mask": (columns[:stop] >= starts[live, None]).long(),
            "position_ids": (columns[first:stop] - starts[live, None]).clamp_min(0),
            cache_is: cache,
            "use_cache": True,
        }

    if length > 1:
        # The prefill skips the head: applied to one column of many, torch would copy its weight for each row.
        trunk(model)(input_ids=ids[:, :-1], **inputs(0, length - 1))
        ids = ids[:, -1:]
    for step in range(sampling.max_new_tokens):
        logits = model(input_ids=ids, **inputs(length + step - 1, length + step)).logits[:, -1]
        tokens = _next(logits, sampling, generator)
        made[live, step] = tokens
        open_rows &= ~torch.isin(tokens, stops)
        meter.step(len(prompts), len(live))
        left = int(open_rows.sum())
        if left == 0:
            break
        if left <= KEPT_SHARE * len(live):
            kept = open_rows.nonzero()[:, 0]
            cache.reorder_cache(kept)
            live, tokens, open_rows = live[kept], tokens[kept], open_rows[kept]
        ids = tokens[:, None]
    return [_until_stop(row, stop_ids) for row in made.tolist()]


def _next(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Picks the next tokens, [B, V] -> [B]: greedily, or sampled."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    kept = filtered(logits.float() / sampling.temperature, sampling.token_filter)
    return torch.multinomial(torch.softmax(kept, -1), 1, generator=generator)[:, 0]


class _InPlace(DynamicLayer):
    """Keeps keys and values in a buffer for the whole answer, so that a step copies nothing.

    Args:
        capacity: tokens of prompt and answer.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, kv_heads, n, d] keys and values; returns all of them so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._storage = [self._buffer(x) for x in (key_states, value_states)]
            self.keys, self.values = (buffer[:, :, :0] for buffer in self._storage)
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for buffer, new in zip(self._storage, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._storage)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keeps some rows of the batch."""
        length = self.keys.shape[-2]
        kept = [buffer[beam_idx, :, :length] for buffer in self._storage]
        # The remaining rows move to the front of the same memory.
        self._storage = [buffer[: len(beam_idx)] for buffer in self._storage]
        for buffer, rows in zip(self._storage, kept, strict=True):
            buffer[:, :, :length] = rows
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._storage)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        batch, heads, _, size = like.shape
        return like.new_empty(batch, heads, self.capacity, size)


def _cache(model: Any, capacity: int) -> DynamicCache:
    """Builds transformers' own cache, but with full-attention layers that are written in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_InPlace(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _until_stop(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]


class _Meter:
    """Reports how many prompts are answered, and the tokens per second."""

    def __init__(self, prompts: int, max_new_tokens: int, progress: Progress) -> None:
        self._total, self._progress = prompts, progress
        self._max_new_tokens = max_new_tokens
        self._started = time.monotonic()
        self._done = 0.0
        self._tokens = 0
        self._steps = self._running = 0

    def finish(self, prompts: int, tokens: int) -> None:
        """Counts a finished batch."""
        self._done += prompts
        self._tokens += tokens
        self._steps = self._running = 0
        self._report(self._done, self._tokens)

    def step(self, prompts: int, live: int) -> None:
        """Counts one token of each of `live` rows of a batch of `prompts`."""
        self._steps += 1
        self._running += live
        share = prompts * min(1.0, self._steps / self._max_new_tokens)
        self._report(self._done + share, self._tokens + self._running)

    def _report(self, done: float, tokens: int) -> None:
        rate = tokens / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:,.0f} tokens/s"
        self._progress(ProgressEvent(stage="regenerate", done=done, total=self._total, unit="prompts", note=note))
