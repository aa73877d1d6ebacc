"""Acceptance length by length of the context and by place in the answer.

The number of known tokens when a round begins, of prompt and answer or of the answer alone, decides its bin. The tokens
of a bin are all that its rounds emit, even past the bin's end, so a suite's rounds and tokens are the sums over its
bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from speculators.bench.replay import Replayed
from speculators.bench.statistics import bootstrap_ratio
from speculators.bench.walk import walk_places

# The largest number of known tokens in each bin. Bins without rounds are left out.
EDGES = 64 * 2 ** np.arange(26)


@attrs.frozen(kw_only=True)
class TokenBin:
    """The rounds that begin with a number of known tokens in one range.

    Attributes:
        up_to: the largest number of known tokens; the smallest is one more than half of it, or 1 in the first bin.
        tau: tokens / rounds.
        tau_interval: 95%, bootstrap over the prompts that have rounds here.
        by_prompt: (tokens, expected rounds) of each prompt, over its turns.
    """

    up_to: int
    tau: float
    tau_interval: tuple[float, float]
    by_prompt: dict[str, tuple[float, float]]

    @property
    def fewest(self) -> int:
        """The smallest number of known tokens."""
        return 1 if self.up_to == EDGES[0] else self.up_to // 2 + 1

    @property
    def tokens(self) -> float:
        """Tokens that the bin's rounds emit."""
        return sum(tokens for tokens, _ in self.by_prompt.values())


def bins_by_context(replayed: Replayed, num_tokens: int, *, seed: int) -> tuple[TokenBin, ...]:
    """Computes acceptance by the number of tokens, of prompt and answer, that are known when a round begins.

    Args:
        replayed: exact at K = `num_tokens`.
        seed: of the bootstrap.
    """
    return _bins(replayed, num_tokens, replayed.prompt_lengths, seed)


def bins_by_place(replayed: Replayed, num_tokens: int, *, seed: int) -> tuple[TokenBin, ...]:
    """Computes acceptance by the number of the answer's tokens that are known when a round begins; Args as above."""
    return _bins(replayed, num_tokens, [0] * len(replayed.ids), seed)


def _bins(replayed: Replayed, num_tokens: int, before: Sequence[int], seed: int) -> tuple[TokenBin, ...]:
    """Sorts rounds into bins; `before` is the number of tokens that count as known before each answer."""
    visited, emitted = walk_places(replayed.acceptance, num_tokens)
    sums: dict[int, dict[str, tuple[float, float]]] = {}
    for row, table in enumerate(replayed.acceptance):
        # At anchor i the tokens y_0 .. y_i of the answer are known.
        known = before[row] + 1 + np.arange(len(table))
        index = np.searchsorted(EDGES, known)
        rounds = np.bincount(index, weights=visited[row, : len(table)])
        tokens = np.bincount(index, weights=emitted[row, : len(table)])
        for place in np.flatnonzero(rounds).tolist():
            of_bin = sums.setdefault(place, {})
            so_far = of_bin.get(replayed.ids[row], (0.0, 0.0))
            of_bin[replayed.ids[row]] = (so_far[0] + float(tokens[place]), so_far[1] + float(rounds[place]))
    return tuple(_bin(int(EDGES[place]), sums[place], seed) for place in sorted(sums))


def _bin(up_to: int, by_prompt: dict[str, tuple[float, float]], seed: int) -> TokenBin:
    counts = np.array(list(by_prompt.values()))  # [prompts, 2]: tokens, rounds
    tokens, rounds = counts.sum(axis=0)
    return TokenBin(
        up_to=up_to,
        tau=float(tokens / rounds),
        tau_interval=bootstrap_ratio(counts[:, 0], counts[:, 1], seed=seed),
        by_prompt=by_prompt,
    )
