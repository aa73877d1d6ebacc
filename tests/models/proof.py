"""What the proofs of all algorithms share: overfitting, judged responses, live decoding of one."""

from __future__ import annotations

import torch

from speculators.bench.rows import Response, Row, judge
from speculators.decoding.loop import Decoded, decode
from speculators.decoding.target import CachedVerifier
from speculators.verifier.weights import load_head

from .conftest import LAYER_IDS, World


def fit(model, kwargs, row, steps=200, lr=5e-3):
    """Overfits one row and returns the last metrics."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        _, loss, metrics = model(**row, **kwargs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def judged(world: World, which, temperature=0.0, layer_ids=LAYER_IDS) -> list[Row]:
    """The verifier's own responses to some of the prompts, as replay takes them."""
    head = load_head(world.folder, world.engine.facts)
    rows = []
    for index in which:
        tokens = (*world.prompts[index], *world.answers[index])
        response = Response(id=str(index), category="", tokens=tokens, prompt_length=len(world.prompts[index]))
        states, last = world.engine.capture([torch.tensor(tokens)], layer_ids)[0]
        rows.append(judge(head, response, states, last, temperature=temperature))
    return rows


def live(world: World, model, row: Row, *, num_tokens: int) -> Decoded:
    """Decodes one prompt greedily with the model's own drafter."""
    drafter = model.draft()
    return decode(
        CachedVerifier(world.engine.model, drafter.target_layer_ids),
        drafter,
        torch.tensor(row.response.prompt),
        max_new_tokens=len(row.response.answer),
        num_tokens=num_tokens,
        temperature=0.0,
        generator=None,
        stop_ids=frozenset(world.engine.stop_ids),
    )
