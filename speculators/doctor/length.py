"""Does acceptance hold in long contexts: the same drafts of the same answers, alone and behind other conversations.

The answers are put into one sequence, one behind the other, and the verifier reads it. At each place the draft is held
against what the verifier says there, in the short context and in the long one: what differs between texts cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import torch

from speculators.doctor.alignment import Bench
from speculators.doctor.check import Check, Family
from speculators.doctor.trials import LEVEL, sign_flip, units

LENGTH = Family("length")
# The longest sequence: the verifier's forward over it takes seconds on two cores.
LONGEST = 4096
# What acceptance may lose, of what it is in short contexts. In the field it collapses, to next to nothing; other text
# in front costs a sound draft up to a fifth (the quickstart's: 48.2% to 37.8% within its length, 47.4% to 42% beyond).
MOST_LOSS = 1 / 3
# Contexts that are told apart, and the least that is called a long one.
PARTS, LEAST = 6, 16


@attrs.frozen(eq=False)
class Places:
    """Drafts of the first depth in one answer, [n] each.

    Attributes:
        context: tokens before each in the long sequence.
        alone: 1 where the draft is what the verifier says, the answer alone.
        behind: the same in the long sequence.
    """

    context: np.ndarray
    alone: np.ndarray
    behind: np.ndarray


def check_length(bench: Bench) -> Iterator[Check]:
    """Yields acceptance within the length of training, and beyond it."""
    origin = bench.patient.origin
    trained = None if origin is None else origin.recipe.data.max_tokens
    limit = min(LONGEST, int(bench.patient.facts.get("max_position_embeddings") or LONGEST))
    limit = min(limit, 2 * trained) if trained else limit
    found = _measure(bench, limit)
    longest = max((int(one.context[-1]) for one in found), default=0)
    inside = [_cut(one, one.context < (trained or longest + 1)) for one in found[1:]]
    yield _judge("within training's length" if trained else "context", inside, trained)
    if trained is None:
        yield LENGTH.skipped("beyond training's length", f"nothing records it: {bench.patient.no_origin}")
    elif longest < trained + LEAST:
        why = f"the answers make {longest} tokens, the verifier takes {limit}, and training went to {trained}"
        yield LENGTH.skipped("beyond training's length", f"no context is longer: {why}")
    else:
        yield _judge("beyond training's length", [_cut(one, one.context >= trained) for one in found], trained)


def _judge(name: str, places: Sequence[Places], trained: int | None) -> Check:
    """Returns the check of some places, with a warning where the long context costs acceptance."""
    there = [one for one in places if len(one.context)]
    if not there:
        return LENGTH.skipped(name, "no context is long enough: give more or longer prompts")
    context, alone, behind = (np.concatenate([getattr(one, key) for one in there]) for key in _KEYS)
    told = f"first drafts that are the verifier's token, by context: {_by_context(context, behind)}"
    told += f"; the same {len(alone):,} places in short contexts {alone.mean():.1%}"
    loss = float(alone.mean() - behind.mean())
    chance = sign_flip(units([one.alone - one.behind for one in there]))
    if loss > MOST_LOSS * alone.mean() and chance <= LEVEL:
        words = f"acceptance falls from {alone.mean():.1%} to {behind.mean():.1%} in long contexts (p = {chance:.1g})"
        words = f"{words}: {told}"
        length = f" (data.max_tokens is {trained}; spec data tells how long they are)" if trained else ""
        return LENGTH.warning(name, words, f"train on conversations as long as those that are served{length}")
    return LENGTH.ok(name, told)


_KEYS = ("context", "alone", "behind")


def _by_context(context: np.ndarray, hits: np.ndarray) -> str:
    order = np.argsort(context, kind="stable")
    parts = [part for part in np.array_split(order, PARTS) if len(part)]
    return ", ".join(f"{context[p].min()} to {context[p].max()} {hits[p].mean():.0%}" for p in parts)


def _cut(one: Places, kept: np.ndarray) -> Places:
    return Places(*(getattr(one, key)[kept] for key in _KEYS))


@torch.no_grad()
def _measure(bench: Bench, limit: int) -> list[Places]:
    """Returns the places of each answer in a sequence of at most `limit` tokens."""
    answers, ids = bench.answers, bench.patient.layer_ids or ()
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
    hits = first_hits(bench, whole, states.float(), last.float())
    found = []
    for start, index in zip(starts, rows, strict=True):
        response = answers.rows[index].response
        size = min(len(response.tokens), len(sequence) - start)
        alone = first_hits(
            bench,
            torch.tensor(response.tokens[:size]),
            answers.states(ids)[index][:size],
            answers.states((answers.num_layers,))[index][:size],
        )
        # Row r drafts place r + 2, which the verifier's state at r + 1 says; rounds begin at the answer's first token.
        own = np.arange(response.prompt_length - 1, size - 2)
        found.append(Places(context=start + own + 2, alone=alone[own], behind=hits[start + own]))
    return found


def first_hits(bench: Bench, tokens: torch.Tensor, states: torch.Tensor, last: torch.Tensor) -> np.ndarray:
    """Returns [S - 2], 1 where the first draft of a row is what the verifier says; row r drafts place r + 2."""
    model, head, device = bench.model, bench.answers.head, bench.patient.device
    size = len(tokens)
    row = {
        "hidden_states": states.to(device)[None],
        "input_ids": tokens.to(device)[None],
        "position_ids": torch.arange(size, device=device)[None],
        "document_ids": torch.zeros(1, size, dtype=torch.int64, device=device),
    }
    logits = next(iter(model.replay(**row, num_speculative_tokens=1)))
    drafts = model.draft_to_target[logits[: size - 2].argmax(-1)].cpu()
    wanted = last[1 : size - 1].to(device=head.weight.device, dtype=head.weight.dtype)
    said = torch.cat([head.logits(part).argmax(-1).cpu() for part in wanted.split(256)])
    return (drafts == said).float().numpy()
