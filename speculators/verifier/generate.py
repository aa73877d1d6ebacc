"""The verifier's own continuations, in batches, by transformers' generate."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import attrs
import torch
from attrs import field
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from speculators.config import positive
from speculators.events import Progress, ProgressEvent, ignore
from speculators.verifier.quiet import quiet

Batch = tuple[tuple[int, ...], list[list[int]]]


@attrs.frozen(kw_only=True)
class Sampling:
    """How continuations are made.

    Attributes:
        max_new_tokens: for each prompt.
        temperature: 0 is greedy; above, the pure distribution at that temperature (no top-k, no top-p).
        seed: of the sampling.
        batch_size: prompts at once.
    """

    max_new_tokens: int = field(validator=positive)
    temperature: float = 0.0
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
    # By content, not by place: so the batches, and what is sampled in them, do not depend on the order given.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    meter = _Meter(len(prompts), sampling.max_new_tokens, progress)
    for number, start in enumerate(range(0, len(order), sampling.batch_size)):
        indices = tuple(order[start : start + sampling.batch_size])
        if all(index in done for index in indices):
            meter.finish(len(indices), 0)
            continue
        outputs = _continue(model, [prompts[i] for i in indices], sampling, stop_ids, number, meter)
        meter.finish(len(indices), sum(map(len, outputs)))
        yield indices, outputs


def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    number: int,
    meter: _Meter,
) -> list[list[int]]:
    length = max(map(len, prompts))
    device = model.device
    # On the left, so that all answers start in the same column; generate derives positions from the mask.
    ids = torch.tensor([[stop_ids[0]] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        # 0 and 1.0 switch both off; left out, transformers would cut to the 50 most likely tokens.
        **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}),
    )
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), quiet():
        torch.manual_seed(sampling.seed * 1_000_003 + number)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([meter.watch(len(prompts))]),
        )
    return [_until_stop(row, stop_ids) for row in output[:, length:].tolist()]


def _until_stop(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]


class _Meter:
    """Tells how many prompts are answered, and how many tokens a second that makes."""

    def __init__(self, prompts: int, max_new_tokens: int, progress: Progress) -> None:
        self._total, self._progress = prompts, progress
        self._max_new_tokens = max_new_tokens
        self._started = time.monotonic()
        self._done = 0.0
        self._tokens = 0

    def finish(self, prompts: int, tokens: int) -> None:
        """Counts a finished batch."""
        self._done += prompts
        self._tokens += tokens
        self._tell(self._done, self._tokens)

    def watch(self, prompts: int) -> StoppingCriteria:
        """Returns a criterion that never stops anything, but sees each token of a batch."""
        meter, steps = self, 0

        class Watch(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                nonlocal steps
                steps += 1
                share = prompts * min(1.0, steps / meter._max_new_tokens)
                meter._tell(meter._done + share, meter._tokens + steps * prompts)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return Watch()

    def _tell(self, done: float, tokens: int) -> None:
        rate = tokens / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:,.0f} tokens/s"
        self._progress(ProgressEvent(stage="regenerate", done=done, total=self._total, unit="prompts", note=note))
