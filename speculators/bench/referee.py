"""Whether the live decode did what replay predicts; a gap is a failure, not a footnote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import attrs
import numpy as np

from speculators.bench.counts import Counts
from speculators.bench.rows import JudgedResponse
from speculators.bench.statistics import by_group, difference_half_width
from speculators.bench.walk import greedy_rounds, round_moments
from speculators.decoding.loop import Decoded

# (row, place in the response, token that live emitted there) -> the verifier gives both tokens the same logit but for
# rounding, which differs between a forward over one token and one over many.
NearTie = Callable[[JudgedResponse, int, int], bool]

# Means over fewer prompts are not compared: an interval that holds its level is then wider than what it could find.
FEWEST_PROMPTS = 6
TOO_FEW = "too few prompts"


@attrs.frozen(kw_only=True)
class Agreement:
    """Predicted beside measured.

    Attributes:
        criterion: what was demanded.
        predicted_tau: replay's acceptance length on the prompts that were decoded live.
        interval: where it had to lie; None where every single round had to agree, or nothing could be judged.
        own_tau: at T > 0, where `predicted_tau` is of live's own responses: that of the verifier's, which the printed
            acceptance length is of, on the same prompts; None at T = 0.
        own_interval: where that had to lie; None at T = 0, or where it could not be judged.
        near_ties: responses that rounding turned into another one; compared up to there.
        gap: the disagreement, with the criterion that failed; "" if there is none.
        untold: a criterion that could not be judged, and why; "" if there is none. It is no disagreement.
    """

    criterion: str
    predicted_tau: float
    interval: tuple[float, float] | None = None
    own_tau: float | None = None
    own_interval: tuple[float, float] | None = None
    near_ties: int = 0
    gap: str = ""
    untold: str = ""

    @property
    def agrees(self) -> bool:
        """Whether there is no gap."""
        return not self.gap

    @property
    def verdict(self) -> str:
        """Returns "agrees", "disagrees", or TOO_FEW where nothing could be judged."""
        if self.gap:
            return "disagrees"
        return TOO_FEW if self.untold and self.interval is None else "agrees"


def agree_by_round(
    rows: Sequence[JudgedResponse],
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
    criterion = f"{level:.2%} interval of live, given its tokens"
    if not measured.rounds.sum():
        return Agreement(criterion=criterion, predicted_tau=predicted.tau, untold=f"{criterion}: live made no round")
    mean, variance = round_moments(acceptance, predicted.accepted.shape[1])
    # The last term is for rounding where nothing is random.
    half = NormalDist().inv_cdf((1 + level) / 2) * float(variance.sum()) ** 0.5 + 1e-4 * float(mean.sum())
    rounds, tokens = float(measured.rounds.sum()), float(measured.tokens.sum())
    interval = (tokens / (rounds + half), tokens / max(rounds - half, 1.0))
    return _in_interval(criterion, predicted.tau, interval)


def agree_over_prompts(
    measured: Counts, *, predicted: Counts, groups: Sequence[str], level: float, what: str
) -> Agreement:
    """Where live's responses may be others than replay's, only the means can be compared, by the prompts' differences.

    Args:
        measured: live counts at this K.
        predicted: replay's counts for the same prompts.
        groups: the prompt of each response.
        level: probability that a correct decode agrees.
        what: is compared, for the criterion.
    """
    prompts = len({group for group, rounds in zip(groups, measured.rounds, strict=True) if rounds})
    criterion = f"{level:.2%} interval of the difference by prompt, {what}"
    if prompts < FEWEST_PROMPTS:
        untold = f"{criterion}: {prompts} prompts are too few to tell, {FEWEST_PROMPTS} are needed"
        return Agreement(criterion=criterion, predicted_tau=predicted.tau, untold=untold)
    before, after = (
        np.stack([by_group(side.tokens, groups), by_group(side.rounds, groups)], axis=1)
        for side in (predicted, measured)
    )
    # The last term is for rounding where all prompts part alike.
    half = difference_half_width(before, after, level=level) + 1e-4 * measured.tau
    return _in_interval(criterion, predicted.tau, (measured.tau - half, measured.tau + half))


def agree_on_both(given: Agreement, own: Agreement) -> Agreement:
    """Returns one verdict of the two criteria at T > 0.

    Args:
        given: over live's own responses.
        own: over the verifier's, to the same prompts.
    """
    return attrs.evolve(
        given,
        criterion=f"{given.criterion}; {own.criterion}",
        own_tau=own.predicted_tau,
        own_interval=own.interval,
        gap="; ".join(filter(None, (given.gap, own.gap))),
        untold="; ".join(filter(None, (given.untold, own.untold))),
    )


def _in_interval(criterion: str, predicted: float, interval: tuple[float, float]) -> Agreement:
    low, high = interval
    inside = low <= predicted <= high
    gap = "" if inside else f"replay predicts {predicted:.4f}, it must be {low:.4f} to {high:.4f} ({criterion})"
    return Agreement(criterion=criterion, predicted_tau=predicted, interval=interval, gap=gap)


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
