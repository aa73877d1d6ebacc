"""Speculators of the real SmolLM2, trained by shortened quickstart recipes, and our live decode of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from kept import kept_run

from speculators.bench.suites import load_suite
from speculators.data.template import ChatTemplate
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.recipe.schema import Suite
from speculators.verifier.engine import Engine

# The data of `quickstart_short`, whose run the slow tests leave: one capture serves all, they read the same layers.
SHORT = (
    "data.sources=[{ path = 'data/quickstart.jsonl', split = 'train', take = 300 }]",
    "schedule.epochs=1",
    "schedule.evaluate_every='100%'",
    "benchmark.suites=[{ name = 'quickstart', take = 12 }]",
    "benchmark.num_speculative_tokens=[3]",
    "benchmark.live_prompts=2",
    "benchmark.max_new_tokens=48",
)


def train(recipe: str) -> Path:
    """Finds the run folder of a shipped recipe, shortening and training it if necessary."""
    return kept_run(recipe, () if recipe.endswith("_short") else SHORT).folder


def questions(engine: Engine, number: int) -> list[list[int]]:
    """Encodes the first prompts of the quickstart's suite."""
    template = ChatTemplate.of(engine.tokenizer)
    return [template.prompt_ids(prompt.messages) for prompt in load_suite(Suite(name="quickstart", take=number))]


@attrs.frozen
class Ours:
    """Our live decode of one prompt, counted as a server counts.

    Attributes:
        tokens: of the response.
        steps: tokens that each round emitted, the prefill's one first.
        by_position: rounds that accepted their j-th draft, those past the end of the response, too.
    """

    tokens: tuple[int, ...]
    steps: tuple[int, ...]
    by_position: tuple[int, ...]


def live(
    engine: Engine, model: SpeculatorModel, prompts: Sequence[Sequence[int]], *, k: int, max_tokens: int
) -> list[Ours]:
    """Decodes prompts greedily, ignoring end tokens."""
    drafter = model.draft()
    responses = []
    for prompt in prompts:
        # Decode longer, so that the last counted round is not cut off: a server counts all drafts that were verified.
        longer = max_tokens + k + 1
        decoded: Decoded = decode(
            CachedVerifier(engine.model, drafter.target_layer_ids),
            drafter,
            torch.tensor(prompt),
            max_new_tokens=longer,
            num_tokens=k,
        )
        rounds = [each for each in decoded.rounds if each.anchor + 1 < max_tokens]
        emitted = [min(each.emitted, max_tokens - 1 - each.anchor) for each in rounds]
        by_position = tuple(sum(each.accepted >= depth for each in rounds) for depth in range(1, k + 1))
        responses.append(Ours(decoded.tokens[:max_tokens], (1, *emitted), by_position))
    return responses


def logit_gap(engine: Engine, tokens: Sequence[int], one: int, other: int) -> float:
    """Computes by how much our verifier prefers token `one` to `other` after `tokens`."""
    with torch.inference_mode():
        logits: Any = engine.model(input_ids=torch.tensor([list(tokens)]), logits_to_keep=1).logits[0, -1]
    return float(logits[one] - logits[other])
