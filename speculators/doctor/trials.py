"""Acceptance under a change of one thing, and whether the change is better: paired, so that noise raises no alarm.

Every comparison pairs the same drafts of the same answers with and without the change. The null hypothesis is that the
change is no better: then each unit's difference is as likely to have the other sign, and the sum's distribution over
all signs is known exactly (a one-sided sign-flip test; Fisher 1935). A unit is an answer, or where there are few
answers a stretch of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import torch

from speculators.bench.rows import Response
from speculators.bench.walk import walk
from speculators.drafter import Replays

# Probability that chance makes any check of a sound speculator wrong, over all comparisons of one examination together;
# so many are made at most (Bonferroni), which makes the level of one 2.5e-4.
FALSE_ALARM = 0.01
COMPARISONS = 40
LEVEL = FALSE_ALARM / COMPARISONS
# The least p value of n units is 2**-n: with 12 units a difference that is the same everywhere can reach the level.
UNITS = 12
# Above this many units the signs are drawn: 2**UNITS_EXACT is still a quick sum, and p is known to 1 in 40,000 beyond.
UNITS_EXACT = 14
DRAWS = 40_000
# Of the accepted drafts: what is surely better, but by less, is no reason to change anything.
LEAST_GAIN = 0.05


@attrs.frozen(eq=False)
class Trial:
    """Which drafts were accepted.

    Attributes:
        tables: an answer each, [L, K] of zeros and ones as in `bench.walk`.
        drafts: an answer each, [L, K] int64, the tokens that were drafted.
        first: the first answer's logits of depth 1, which tell whether the draft read what was changed.
    """

    tables: tuple[np.ndarray, ...]
    drafts: tuple[torch.Tensor, ...]
    first: torch.Tensor

    def against(self, responses: Sequence[Response], labels: int) -> Trial:
        """Returns the same drafts, held against the token so many places later than those that they are for."""
        pairs = zip(responses, self.drafts, strict=True)
        return attrs.evolve(self, tables=tuple(_hits(response, drafts, labels) for response, drafts in pairs))

    @property
    def tau(self) -> float:
        """Tokens a round."""
        return walk(self.tables, self.tables[0].shape[1]).tau

    @property
    def accepted(self) -> list[np.ndarray]:
        """[L] each: how many drafts a round would have accepted that began at each place."""
        return [table.cumprod(axis=1).sum(axis=1) for table in self.tables]

    @property
    def mean(self) -> float:
        """Accepted drafts a place."""
        return float(np.concatenate(self.accepted).mean())

    @property
    def hits(self) -> float:
        """Share of places whose first draft is accepted."""
        return float(np.concatenate([table[:, 0] for table in self.tables]).mean())


@attrs.frozen(kw_only=True)
class Change:
    """What is done differently in a trial.

    Attributes:
        tokens: the token read beside a state is so many places later.
        positions: the answer's tokens stand so many positions later, the prompt's where they were.
    """

    tokens: int = 0
    positions: int = 0


@attrs.frozen(eq=False)
class Comparison:
    """A change against what is configured.

    Attributes:
        gain: accepted drafts a place that the change adds.
        share: the same as a share of what is accepted without it.
        p: probability of such a gain, or a larger one, if the change is no better.
        p_worse: the same of a loss, if it is no worse.
    """

    gain: float
    share: float
    p: float
    p_worse: float

    @property
    def better(self) -> bool:
        """Whether the change is better beyond chance, and by enough to matter."""
        return self.gain > 0 and self.share >= LEAST_GAIN and self.p <= LEVEL

    @property
    def worse(self) -> bool:
        """Whether it is worse beyond chance."""
        return self.gain < 0 and self.share <= -LEAST_GAIN and self.p_worse <= LEVEL


@torch.no_grad()
def attempt(
    model: Replays,
    responses: Sequence[Response],
    states: Sequence[torch.Tensor],
    k: int,
    change: Change = Change(),  # frozen
) -> Trial:
    """Replays a draft on the verifier's own greedy answers.

    Args:
        responses: the answers.
        states: [n, A*H] of each, in the model's dtype.
        k: depths.
        change: what is done differently.
    """
    device = model.draft_to_target.device
    found: list[torch.Tensor] = []
    first = torch.empty(0)
    for response, state in zip(responses, states, strict=True):
        size, rounds = len(response.tokens), len(response.answer) - 1
        rows = torch.arange(size - 2 - rounds, size - 2, device=device)
        depths = model.replay(**_batch(response, state, change, device), num_speculative_tokens=k)
        drafts = []
        for logits in depths:
            chosen = logits[rows]
            drafts.append(model.draft_to_target[chosen.argmax(-1)].cpu())
            if not len(first):
                first = chosen.float().cpu()
        found.append(torch.stack(drafts, dim=1))
    tables = tuple(_hits(response, drafts, 0) for response, drafts in zip(responses, found, strict=True))
    return Trial(tables, tuple(found), first)


def _hits(response: Response, drafts: torch.Tensor, labels: int) -> np.ndarray:
    """Returns [L, K], 1 where a draft is the answer's token; anchor i drafts tokens i + 1 .. i + K of the answer."""
    answer = torch.tensor(response.answer)
    place = 1 + torch.arange(drafts.shape[0])[:, None] + torch.arange(drafts.shape[1]) + labels
    right = drafts == answer[place.clamp_max(len(answer) - 1)]
    return (right & (place < len(answer))).float().numpy()


def _batch(response: Response, states: torch.Tensor, change: Change, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(response.tokens)
    size = len(tokens)
    positions = torch.arange(size)
    positions[response.prompt_length :] += change.positions
    read = tokens[(torch.arange(size) + change.tokens).clamp(0, size - 1)]
    return {
        "hidden_states": states.to(device)[None],
        "input_ids": read.to(device)[None],
        "position_ids": positions.to(device)[None],
        "document_ids": torch.zeros(1, size, dtype=torch.int64, device=device),
    }


def compare(configured: Trial, changed: Trial) -> Comparison:
    """Returns whether the change is better than what is configured."""
    pairs = zip(configured.accepted, changed.accepted, strict=True)
    differences = [other - one for one, other in pairs]
    gain = float(np.concatenate(differences).mean())
    share = math.inf if gain > 0 and configured.mean == 0 else gain / configured.mean if configured.mean else 0.0
    sums = units(differences)
    return Comparison(gain=gain, share=share, p=sign_flip(sums), p_worse=sign_flip(-sums))


def units(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum of differences of each unit: an answer, or where there are few of them a stretch of one."""
    # Twice as many stretches: in some of them nothing differs, and these tell nothing.
    pieces = 1 if len(differences) >= UNITS else -(-2 * UNITS // max(1, len(differences)))
    parts = [part for one in differences for part in np.array_split(one, min(pieces, max(1, len(one))))]
    return np.array([part.sum() for part in parts])


def sign_flip(sums: np.ndarray) -> float:
    """Returns the one-sided p value of the sum of `sums` [n] under random signs."""
    size = len(sums)
    if size <= UNITS_EXACT:
        codes = np.arange(2**size)
        signs = 1 - 2 * ((codes[:, None] >> np.arange(size)) & 1)
        return float((signs @ sums >= sums.sum() - 1e-9).mean())
    signs = np.random.default_rng(0).choice((-1, 1), size=(DRAWS, size))
    return float((1 + (signs @ sums >= sums.sum() - 1e-9).sum()) / (1 + DRAWS))
