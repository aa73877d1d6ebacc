"""Speculators of the real SmolLM2, trained by shortened quickstart recipes into a kept folder, and how ours decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from foreign import home

from speculators.bench.suites import load_suite
from speculators.data.template import ChatTemplate
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.pipeline import Places, run_recipe
from speculators.pipeline.locking import code_here
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Suite
from speculators.training.world import World
from speculators.verifier.engine import Engine
from speculators.verifier.sources import cache_folder

# One capture serves all: they read the same layers of the same conversations.
SHORT = (
    "data.sources=[{ path = 'data/quickstart.jsonl', split = 'train', take = 200 }]",
    "schedule.epochs=2",
    "schedule.evaluate_every='100%'",
    "benchmark.suites=[{ name = 'quickstart', take = 12 }]",
    "benchmark.num_speculative_tokens=[3]",
    "benchmark.live_prompts=2",
    "benchmark.max_new_tokens=48",
)


def train(recipe: str) -> Path:
    """Returns the run folder of a short run of a shipped recipe, trained if it is not there."""
    # What other code of ours trained is not what is tested.
    places = Places(runs=home() / "runs" / code_here().sources[:12], cache=cache_folder())
    outcome = run_recipe(load_recipe(recipe, SHORT), places=places, world=World(), listen=lambda event: None)
    assert outcome.bench is not None
    assert outcome.bench["agrees"], "replay and live decode differ before any server is asked"
    return outcome.folder


def questions(engine: Engine, number: int) -> list[list[int]]:
    """Returns the tokens of the first prompts of the quickstart's suite."""
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
    """Decodes prompts greedily without looking for an end."""
    drafter = model.draft()
    found = []
    for prompt in prompts:
        # So much longer that the last round that counts is not cut off: a server counts its drafts as they were judged.
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
        found.append(Ours(decoded.tokens[:max_tokens], (1, *emitted), by_position))
    return found


def logit_gap(engine: Engine, tokens: Sequence[int], one: int, other: int) -> float:
    """Returns by how much our verifier prefers token `one` to `other` after `tokens`."""
    with torch.inference_mode():
        logits: Any = engine.model(input_ids=torch.tensor([list(tokens)]), logits_to_keep=1).logits[0, -1]
    return float(logits[one] - logits[other])
