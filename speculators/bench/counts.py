"""Counts of tokens, rounds and acceptance by position, with one definition for the exact walk and the live decode."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from speculators.decoding.loop import Decoded


@attrs.frozen(eq=False, kw_only=True)
class Counts:
    """Totals of each response at one K. The first token comes from the prefill and belongs to no round.

    Attributes:
        tokens: [n] tokens emitted by rounds.
        rounds: [n] rounds; expected rounds where they come from the walk.
        drafted: [n] drafted tokens, including those past the end of the response.
        reached: [n, K] rounds that judged depth j: all earlier drafts were accepted and the response goes on.
        accepted: [n, K] rounds that accepted depth j.
    """

    tokens: np.ndarray
    rounds: np.ndarray
    drafted: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray

    @property
    def tau(self) -> float:
        """Tokens emitted per round, including the verifier's own; a ratio of sums, NaN without rounds."""
        return _ratio(self.tokens.sum(), self.rounds.sum())

    @property
    def drafted_per_round(self) -> float:
        """Tokens drafted per round; a ratio of sums, NaN without rounds."""
        return _ratio(self.drafted.sum(), self.rounds.sum())

    @property
    def by_position(self) -> tuple[float, ...]:
        """Probability that a round accepts its j-th draft, j = 1..K."""
        return tuple(_ratio(number, self.rounds.sum()) for number in self.accepted.sum(axis=0))

    @property
    def by_position_conditional(self) -> tuple[float, ...]:
        """The same, given that the round reached position j; NaN for a position that was never reached."""
        return tuple(map(_ratio, self.accepted.sum(axis=0), self.reached.sum(axis=0)))

    def select(self, rows: Sequence[int] | np.ndarray) -> Counts:
        """Picks the counts of some of the responses."""
        index = np.asarray(rows, dtype=np.int64)
        return Counts(
            tokens=self.tokens[index],
            rounds=self.rounds[index],
            drafted=self.drafted[index],
            reached=self.reached[index],
            accepted=self.accepted[index],
        )


def count_decoded(responses: Sequence[Decoded], num_tokens: int) -> Counts:
    """Counts live rounds.

    Args:
        responses: decoded with one K.
        num_tokens: K.
    """
    reached = np.zeros((len(responses), num_tokens))
    accepted = np.zeros_like(reached)
    for row, response in enumerate(responses):
        for each in response.rounds:
            # Drafts past the end of the response are not judged: the walk does not count them either.
            left = len(response.tokens) - 1 - each.anchor
            reached[row, : min(each.accepted + 1, each.drafted, left)] += 1
            accepted[row, : each.accepted] += 1
    return Counts(
        tokens=np.array([len(response.tokens) - 1 for response in responses], dtype=np.float64),
        rounds=np.array([len(response.rounds) for response in responses], dtype=np.float64),
        drafted=np.array([sum(each.drafted for each in response.rounds) for response in responses], dtype=np.float64),
        reached=reached,
        accepted=accepted,
    )


def _ratio(number: float, total: float) -> float:
    return float(number) / float(total) if total > 0 else float("nan")
