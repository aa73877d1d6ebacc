"""Acceptance after one change, compared in pairs so that noise raises no alarm.

Every comparison pairs the same drafts of the same answers, with and without the change. The null hypothesis is that
the change does not help. Under it each unit's difference is equally likely to have the opposite sign, so the
distribution of the sum over all signs is known exactly (one-sided sign-flip test; Fisher 1935). A unit is an answer,
or a stretch of one if there are few answers.
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

# Probability that chance fails any check of a sound speculator, over one whole examination. At most COMPARISONS are
# made, so each has the level 2.5e-4 (Bonferroni).
FALSE_ALARM = 0.01
COMPARISONS = 40
LEVEL = FALSE_ALARM / COMPARISONS
# n units cannot give a p value below 2**-n: 12 units can reach the level if they all differ in the same direction.
UNITS = 12
# Up to this many units all 2**n signs are summed; beyond it DRAWS random ones give p to 1 in 40,000.
UNITS_EXACT = 14
DRAWS = 40_000
# Share of the accepted drafts: a smaller gain, however certain, is no reason to change anything.
LEAST_GAIN = 0.05


@attrs.frozen(eq=False)
class Trial:
    """The drafts of one replay and which of them were accepted.

    Attributes:
        tables: per answer, [L, K] of zeros and ones as in `bench.walk`.
        drafts: per answer, [L, K] int64, the drafted tokens.
        first: depth-1 logits of the first answer; they show whether the draft reads the changed input at all.
    """

    tables: tuple[np.ndarray, ...]
    drafts: tuple[torch.Tensor, ...]
    first: torch.Tensor

    def against(self, responses: Sequence[Response], labels: int) -> Trial:
        """Judges the same drafts against the tokens `labels` places later."""
        pairs = zip(responses, self.drafts, strict=True)
        return attrs.evolve(self, tables=tuple(_hits(response, drafts, labels) for response, drafts in pairs))

    @property
    def tau(self) -> float:
        """Acceptance length, in tokens per round."""
        return walk(self.tables, self.tables[0].shape[1]).tau

    @property
    def accepted(self) -> list[np.ndarray]:
        """Per answer, [L]: drafts accepted by a round that starts at each place."""
        return [table.cumprod(axis=1).sum(axis=1) for table in self.tables]

    @property
    def mean(self) -> float:
        """Mean number of accepted drafts per place."""
        return float(np.concatenate(self.accepted).mean())

    @property
    def hits(self) -> float:
        """Share of places where the first draft is accepted."""
        return float(np.concatenate([table[:, 0] for table in self.tables]).mean())


@attrs.frozen(kw_only=True)
class Shift:
    """An offset to apply in a trial.

    Attributes:
        tokens: reads the token this many places later beside each state.
        positions: moves the answer's position ids by this much, and leaves the prompt's.
    """

    tokens: int = 0
    positions: int = 0


@attrs.frozen(eq=False)
class TrialComparison:
    """The effect of a change on the configured speculator.

    Attributes:
        gain: accepted drafts per place that the change adds.
        share: the gain relative to the drafts accepted without the change.
        p: probability of a gain this large if the change does not help.
        p_worse: probability of a loss this large if the change does not hurt.
    """

    gain: float
    share: float
    p: float
    p_worse: float

    @property
    def better(self) -> bool:
        """Whether the change helps beyond chance and by enough to matter."""
        return self.gain > 0 and self.share >= LEAST_GAIN and self.p <= LEVEL

    @property
    def worse(self) -> bool:
        """Whether the change hurts beyond chance and by enough to matter."""
        return self.gain < 0 and self.share <= -LEAST_GAIN and self.p_worse <= LEVEL


@torch.no_grad()
def attempt(
    model: Replays,
    responses: Sequence[Response],
    states: Sequence[torch.Tensor],
    k: int,
    shift: Shift = Shift(),  # frozen
) -> Trial:
    """Replays a draft on the verifier's greedy answers.

    Args:
        model: the draft model.
        responses: the answers.
        states: per answer, [n, A*H] in the model's dtype.
        k: number of depths.
        shift: the offset to apply.
    """
    device = model.draft_to_target.device
    drafted: list[torch.Tensor] = []
    first = torch.empty(0)
    for response, state in zip(responses, states, strict=True):
        size, rounds = len(response.tokens), len(response.answer) - 1
        # Row r drafts place r + 2 first, so these rows draft the answer from its second token on.
        rows = torch.arange(size - 2 - rounds, size - 2, device=device)  # [L]
        depths = model.replay(**_batch(response, state, shift, device), num_speculative_tokens=k)
        drafts = []
        for logits in depths:
            chosen = logits[rows]  # [L, D]
            drafts.append(model.draft_to_target[chosen.argmax(-1)].cpu())
            if not len(first):
                first = chosen.float().cpu()
        drafted.append(torch.stack(drafts, dim=1))  # [L, K]
    tables = tuple(_hits(response, drafts, 0) for response, drafts in zip(responses, drafted, strict=True))
    return Trial(tables, tuple(drafted), first)


def _hits(response: Response, drafts: torch.Tensor, labels: int) -> np.ndarray:
    """Marks the drafts that equal the answer's tokens, [L, K]; anchor i drafts tokens i + 1 .. i + K of the answer."""
    answer = torch.tensor(response.answer)
    place = 1 + torch.arange(drafts.shape[0])[:, None] + torch.arange(drafts.shape[1]) + labels
    right = drafts == answer[place.clamp_max(len(answer) - 1)]
    return (right & (place < len(answer))).float().numpy()


def _batch(response: Response, states: torch.Tensor, shift: Shift, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(response.tokens)
    size = len(tokens)
    positions = torch.arange(size)
    positions[response.prompt_length :] += shift.positions
    read = tokens[(torch.arange(size) + shift.tokens).clamp(0, size - 1)]
    return {
        "hidden_states": states.to(device)[None],
        "input_ids": read.to(device)[None],
        "position_ids": positions.to(device)[None],
        "document_ids": torch.zeros(1, size, dtype=torch.int64, device=device),
    }


def compare(configured: Trial, changed: Trial) -> TrialComparison:
    """Tests whether a change helps or hurts, paired by answer."""
    pairs = zip(configured.accepted, changed.accepted, strict=True)
    differences = [other - one for one, other in pairs]
    gain = float(np.concatenate(differences).mean())
    share = math.inf if gain > 0 and configured.mean == 0 else gain / configured.mean if configured.mean else 0.0
    sums = units(differences)
    return TrialComparison(gain=gain, share=share, p=sign_flip(sums), p_worse=sign_flip(-sums))


def units(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Sums the differences within each unit: an answer, or a stretch of one if there are few answers."""
    # Cut twice as many stretches as needed: some will show no difference and so carry no information.
    pieces = 1 if len(differences) >= UNITS else -(-2 * UNITS // max(1, len(differences)))
    parts = [part for one in differences for part in np.array_split(one, min(pieces, max(1, len(one))))]
    return np.array([part.sum() for part in parts])


def sign_flip(sums: np.ndarray) -> float:
    """Computes the one-sided p value of the total of `sums` [n] under random signs."""
    size = len(sums)
    if size <= UNITS_EXACT:
        codes = np.arange(2**size)
        signs = 1 - 2 * ((codes[:, None] >> np.arange(size)) & 1)
        return float((signs @ sums >= sums.sum() - 1e-9).mean())
    signs = np.random.default_rng(0).choice((-1, 1), size=(DRAWS, size))
    return float((1 + (signs @ sums >= sums.sum() - 1e-9).sum()) / (1 + DRAWS))
