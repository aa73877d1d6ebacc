"""Checks that acceptance holds in long contexts.

The answers are concatenated into one long sequence for the verifier to read. At each place the draft is compared with
the verifier's greedy token, once in the answer's own short context and once in the long one, so differences between
texts cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import torch

from speculators.doctor.check import Check, Family
from speculators.doctor.paired import LEVEL, chance
from speculators.doctor.trials import DraftTrials

LENGTH = Family("length")
# Length of the sequence: the verifier's forward then takes seconds on two cores.
LONGEST = 4096
# Share of the acceptance that long contexts may cost. Field failures lose nearly all of it; unrelated text in front
# costs a sound draft up to a fifth (the quickstart: 48.2% to 37.8% within its training length, 47.4% to 42% beyond).
MOST_LOSS = 1 / 3
# Number of context bins to report, and tokens beyond the training length that count as a longer context.
PARTS, LEAST = 6, 16


@attrs.frozen(eq=False)
class DraftPlaces:
    """First-depth drafts of one answer, [n] each.

    Attributes:
        context: number of preceding tokens in the long sequence.
        alone: 1 where the draft equals the verifier's token, with the answer alone.
        behind: the same with the answer in the long sequence.
    """

    context: np.ndarray
    alone: np.ndarray
    behind: np.ndarray


def check_length(trials: DraftTrials) -> Iterator[Check]:
    """Yields the check within the training length, then the check beyond it."""
    origin = trials.speculator.origin
    trained = None if origin is None else origin.recipe.data.max_tokens
    limit = min(LONGEST, int(trials.speculator.facts.get("max_position_embeddings") or LONGEST))
    limit = min(limit, 2 * trained) if trained else limit
    measured = _measure(trials, limit)
    longest = max((int(one.context[-1]) for one in measured), default=0)
    inside = [_cut(one, one.context < (trained or longest + 1)) for one in measured[1:]]
    yield _judge("within training's length" if trained else "context", inside, trained)
    if trained is None:
        yield LENGTH.skipped("beyond training's length", trials.speculator.origin_problem)
    elif longest < trained + LEAST:
        why = f"the answers fill {longest} tokens of at most {limit}, and training went up to {trained}"
        yield LENGTH.skipped("beyond training's length", f"no context is long enough: {why}")
    else:
        yield _judge("beyond training's length", [_cut(one, one.context >= trained) for one in measured], trained)


def _judge(name: str, places: Sequence[DraftPlaces], trained: int | None) -> Check:
    """Warns if the long context costs these places more acceptance than it may."""
    there = [one for one in places if len(one.context)]
    if not there:
        return LENGTH.skipped(name, "no context is long enough: give more or longer prompts")
    context, alone, behind = (np.concatenate([getattr(one, key) for one in there]) for key in _KEYS)
    figures = f"first drafts that equal the verifier's token, by context length: {_by_context(context, behind)}"
    figures += f"; the same {len(alone):,} places in short contexts {alone.mean():.1%}"
    loss = float(alone.mean() - behind.mean())
    p = chance([one.alone - one.behind for one in there])
    if loss > MOST_LOSS * alone.mean() and p <= LEVEL:
        fall = f"acceptance falls from {alone.mean():.1%} to {behind.mean():.1%} in long contexts (p = {p:.1g})"
        length = f" (data.max_tokens is {trained}; spec data shows their lengths)" if trained else ""
        todo = f"train on conversations as long as those that are served{length}"
        return LENGTH.warning(name, f"{fall}: {figures}", todo)
    return LENGTH.ok(name, figures)


_KEYS = ("context", "alone", "behind")


def _by_context(context: np.ndarray, hits: np.ndarray) -> str:
    order = np.argsort(context, kind="stable")
    parts = [part for part in np.array_split(order, PARTS) if len(part)]
    return ", ".join(f"{context[p].min()} to {context[p].max()} {hits[p].mean():.0%}" for p in parts)


def _cut(one: DraftPlaces, kept: np.ndarray) -> DraftPlaces:
    return DraftPlaces(*(getattr(one, key)[kept] for key in _KEYS))


@torch.no_grad()
def _measure(trials: DraftTrials, limit: int) -> list[DraftPlaces]:
    """Replays each answer alone and within one sequence of at most `limit` tokens."""
    answers, ids = trials.answers, trials.speculator.layer_ids or ()
    starts: list[int] = []
    rows: list[int] = []
    sequence: list[int] = []
    for index, row in enumerate(answers.rows):
        tokens = row.response.tokens[: limit - len(sequence)]
        if len(tokens) > row.response.prompt_length + 2:
            starts.append(len(sequence))
            rows.append(index)
            sequence += tokens
    whole = torch.tensor(sequence)
    states, last = answers.engine.capture([whole], ids)[0]
    hits = first_hits(trials, whole, states.float(), last.float())
    measured = []
    for start, index in zip(starts, rows, strict=True):
        response = answers.rows[index].response
        size = min(len(response.tokens), len(sequence) - start)
        alone = first_hits(
            trials,
            torch.tensor(response.tokens[:size]),
            answers.states(ids)[index][:size],
            answers.states((answers.num_layers,))[index][:size],
        )
        # Row r drafts place r + 2; rounds begin at the answer's first token.
        own = np.arange(response.prompt_length - 1, size - 2)
        measured.append(DraftPlaces(context=start + own + 2, alone=alone[own], behind=hits[start + own]))
    return measured


def first_hits(trials: DraftTrials, tokens: torch.Tensor, states: torch.Tensor, last: torch.Tensor) -> np.ndarray:
    """Marks the rows whose first draft equals the verifier's greedy token, [S - 2]; row r drafts place r + 2."""
    model, head, device = trials.model, trials.answers.head, trials.speculator.device
    size = len(tokens)
    row = {
        "hidden_states": states.to(device)[None],
        "input_ids": tokens.to(device)[None],
        "position_ids": torch.arange(size, device=device)[None],
        "document_ids": torch.zeros(1, size, dtype=torch.int64, device=device),
    }
    logits = next(iter(model.replay(**row, num_speculative_tokens=1)))
    drafts = model.draft_to_target[logits[: size - 2].argmax(-1)].cpu()
    # The verifier's state at place r + 1 predicts place r + 2. Chunks keep the logits [256, V] small.
    states_before = last[1 : size - 1].to(device=head.weight.device, dtype=head.weight.dtype)
    greedy = torch.cat([head.logits(part).argmax(-1).cpu() for part in states_before.split(256)])
    return (drafts == greedy).float().numpy()
