"""Whether the live decode did what replay predicts; a gap is a failure, not a footnote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import attrs
import numpy as np

from speculators.bench.counts import Counts
from speculators.bench.rows import Row
from speculators.bench.statistics import bootstrap_ratio
from speculators.bench.walk import greedy_rounds, round_moments
from speculators.decoding.loop import Decoded

# (row, place in the response, token that live emitted there) -> the verifier gives both tokens the same logit but for
# rounding, which differs between a forward over one token and one over many.
NearTie = Callable[[Row, int, int], bool]


@attrs.frozen(kw_only=True)
class Agreement:
    """Predicted beside measured.

    Attributes:
        criterion: what was demanded.
        predicted_tau: replay's acceptance length on the prompts that were decoded live.
        interval: where it had to lie; None where every single round had to agree.
        near_ties: responses that rounding turned into another one; compared up to there.
        gap: the first disagreement, "" if there is none.
    """

    criterion: str
    predicted_tau: float
    interval: tuple[float, float] | None = None
    near_ties: int = 0
    gap: str = ""

    @property
    def agrees(self) -> bool:
        """Whether there is no gap."""
        return not self.gap


def agree_by_round(
    rows: Sequence[Row],
    decoded: Sequence[Decoded],
    acceptance: Sequence[np.ndarray],
    *,
    predicted: Counts,
    near_tie: NearTie,
) -> Agreement:
    """At T = 0 the walk is deterministic: the same tokens, and the same drafts accepted in every round.

    Args:
        rows: with the verifier's own responses.
        decoded: what live made of their prompts.
        acceptance: replay's table of each row.
        predicted: replay's counts for the rows at this K.
    """
    num_tokens = predicted.accepted.shape[1]
    ties, gap = 0, ""
    for row, live, table in zip(rows, decoded, acceptance, strict=True):
        answer = row.response.answer
        same = _common_prefix(answer, live.tokens)
        if same < max(len(answer), len(live.tokens)):
            if same == min(len(answer), len(live.tokens)) or not near_tie(row, same, live.tokens[same]):
                gap = f"prompt {row.response.id}: live differs from the verifier's own output at token {same}"
                break
            ties += 1
        wanted = greedy_rounds(table, num_tokens)
        got = [(each.anchor, each.accepted) for each in live.rounds]
        # A round tells something only if all that it emitted lies before the place where rounding took over.
        common = [pair for pair in wanted if same == len(answer) or sum(pair) + 1 < same]
        if got[: len(common)] != common or (same == len(answer) and len(got) != len(common)):
            first = _common_prefix(wanted, got)
            live_round, replay_round = got[first : first + 1], wanted[first : first + 1]
            gap = (
                f"prompt {row.response.id}, round {first}, (anchor, accepted): live {live_round}, replay {replay_round}"
            )
            break
    return Agreement(criterion="round for round", predicted_tau=predicted.tau, near_ties=ties, gap=gap)


def agree_given_tokens(
    measured: Counts, acceptance: Sequence[np.ndarray], *, predicted: Counts, level: float
) -> Agreement:
    """At T > 0: given the tokens that live emitted, its rounds are random with mean and variance that the walk knows.

    Args:
        measured: live counts at this K.
        acceptance: replay's tables of the responses that live itself emitted.
        predicted: their counts.
        level: probability that a correct decode agrees.
    """
    mean, variance = round_moments(acceptance, predicted.accepted.shape[1])
    # The last term is for rounding where nothing is random.
    half = NormalDist().inv_cdf((1 + level) / 2) * float(variance.sum()) ** 0.5 + 1e-4 * float(mean.sum())
    rounds, tokens = float(measured.rounds.sum()), float(measured.tokens.sum())
    interval = (tokens / (rounds + half), tokens / max(rounds - half, 1.0))
    return _in_interval(f"{level:.2%} interval of live, given its tokens", predicted.tau, interval)


def agree_over_prompts(measured: Counts, *, predicted: Counts, groups: Sequence[str], level: float) -> Agreement:
    """At T = 0 in 16 bits, where forwards of different shapes pick different tokens: only the mean can be compared.

    Args:
        measured: live counts at this K.
        predicted: replay's counts for the same prompts.
        groups: the prompt of each response.
        level: of the bootstrap interval of live's acceptance length.
    """
    interval = bootstrap_ratio(measured.tokens, measured.rounds, groups=groups, level=level)
    return _in_interval(f"{level:.2%} interval of live over prompts (16-bit verifier)", predicted.tau, interval)


def _in_interval(criterion: str, predicted: float, interval: tuple[float, float]) -> Agreement:
    low, high = interval
    inside = low <= predicted <= high
    gap = "" if inside else f"replay predicts {predicted:.4f}, live's interval is {low:.4f} to {high:.4f}"
    return Agreement(criterion=criterion, predicted_tau=predicted, interval=interval, gap=gap)


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
