"""Checks the live decode against the prediction of replay; a gap is a failure, not a footnote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import attrs
import numpy as np
import torch

from speculators.bench.counts import Counts
from speculators.bench.rows import JudgedResponse
from speculators.bench.statistics import by_group, difference_half_width
from speculators.bench.walk import greedy_rounds, round_moments
from speculators.decoding.loop import Decoded
from speculators.structure.faults import FloatOrNaN
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import VerifierHead

# (row, place in the response, token that live emitted there) -> the verifier's logits of both tokens differ by rounding
# alone, which is not the same in a forward over one token and in one over many.
NearTie = Callable[[JudgedResponse, int, int], bool]

# Means over fewer prompts are not compared: the interval that keeps its level is then wider than any gap worth finding.
FEWEST_PROMPTS = 6
TOO_FEW = "too few prompts"
# Cached decoding and a whole forward differ by up to 8e-5 in logits of size 48 (SmolLM2, float32). This leaves room.
NEAR_TIE_LOGITS = 1e-3
# In 16 bits the two differ by up to 1.5 in logits of size 28 (SmolLM2, bf16): as a share of the largest logit.
NEAR_TIE_SHARE = 0.06


@attrs.frozen(kw_only=True)
class Agreement:
    """Prediction beside measurement.

    Attributes:
        criterion: the requirement.
        predicted_tau: replay's acceptance length on the prompts that were decoded live; at T > 0, over the responses
            that live itself emitted.
        interval: where `predicted_tau` had to lie; None where every single round had to agree, or nothing was judged.
        own_tau: at T > 0, replay's acceptance length on the same prompts over the verifier's own responses, as in the
            printed tau; None at T = 0.
        own_interval: where `own_tau` had to lie; None at T = 0 and where it was not judged.
        near_ties: responses that left the verifier's output by rounding; round by round they were compared up to there.
        gap: the disagreement and the criterion it breaks, or "".
        untold: a criterion that was not judged and why, or ""; not a disagreement.
        agrees: whether there is no gap.
        verdict: "agrees", "disagrees", or TOO_FEW where nothing was judged.
    """

    criterion: str
    predicted_tau: FloatOrNaN
    interval: tuple[FloatOrNaN, FloatOrNaN] | None = None
    own_tau: float | None = None
    own_interval: tuple[FloatOrNaN, FloatOrNaN] | None = None
    near_ties: int = 0
    gap: str = ""
    untold: str = ""
    agrees: bool = attrs.field(init=False)
    verdict: str = attrs.field(init=False)

    @agrees.default
    def _agrees(self) -> bool:
        return not self.gap

    @verdict.default
    def _verdict(self) -> str:
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
    """Demands, at T = 0, the same tokens and the same accepted drafts in every round: the walk is deterministic there.

    Args:
        rows: the verifier's own responses.
        decoded: live's responses to the same prompts.
        acceptance: replay's table of each row, [L, K].
        predicted: replay's counts for the rows at this K.
        near_tie: whether two tokens are a near-tie of the verifier's logits.
    """
    num_tokens = predicted.accepted.shape[1]
    ties, gap = 0, ""
    for row, live, table in zip(rows, decoded, acceptance, strict=True):
        answer = row.response.answer
        same, gap = _parting(row, live, near_tie)
        if gap:
            break
        ties += same < len(answer)
        expected = greedy_rounds(table, num_tokens)
        measured = [(each.anchor, each.accepted) for each in live.rounds]
        # A round counts only if everything it emitted lies before the token where rounding took over.
        comparable = [pair for pair in expected if same == len(answer) or sum(pair) + 1 < same]
        if measured[: len(comparable)] != comparable or (same == len(answer) and len(measured) != len(comparable)):
            first = _common_prefix(expected, measured)
            live_round, replay_round = measured[first : first + 1], expected[first : first + 1]
            gap = (
                f"prompt {row.response.id}, round {first}, (anchor, accepted): live {live_round}, replay {replay_round}"
            )
            break
    return Agreement(criterion="round for round", predicted_tau=predicted.tau, near_ties=ties, gap=gap)


def _parting(row: JudgedResponse, live: Decoded, near_tie: NearTie) -> tuple[int, str]:
    """Counts the tokens that live shares with the verifier's own response; the gap, unless a near-tie ended that."""
    answer, tokens = row.response.answer, live.tokens
    same = _common_prefix(answer, tokens)
    # A response that merely ends early is a fault, too: rounding can only exchange a token.
    ended = same == min(len(answer), len(tokens))
    if same == max(len(answer), len(tokens)) or (not ended and near_tie(row, same, tokens[same])):
        return same, ""
    return same, f"prompt {row.response.id}: live differs from the verifier's own output at token {same}"


def but_for_near_ties(
    agreement: Agreement, rows: Sequence[JudgedResponse], decoded: Sequence[Decoded], near_tie: NearTie
) -> Agreement:
    """Adds, at T = 0, that live leaves the verifier's own responses at near-ties alone; see `agree_by_round`."""
    partings = [_parting(row, live, near_tie) for row, live in zip(rows, decoded, strict=True)]
    gap = next((gap for _, gap in partings if gap), agreement.gap)
    ties = sum(same < len(row.response.answer) for row, (same, _) in zip(rows, partings, strict=True))
    return attrs.evolve(agreement, near_ties=ties, gap=gap)


def agree_given_tokens(
    measured: Counts, acceptance: Sequence[np.ndarray], *, predicted: Counts, level: float
) -> Agreement:
    """Compares, at T > 0, live with a replay of the very tokens it emitted.

    Given its tokens, only the acceptance of drafts is left to chance, so the number of rounds has a mean and a variance
    that follow from the tables (`round_moments`).

    Args:
        measured: live counts at this K.
        acceptance: replay's tables of the responses that live itself emitted.
        predicted: replay's counts for the same responses.
        level: probability that a correct decode agrees.
    """
    criterion = f"{level:.2%} interval of live, given its tokens"
    if not measured.rounds.sum():
        return Agreement(criterion=criterion, predicted_tau=predicted.tau, untold=f"{criterion}: live made no round")
    mean, variance = round_moments(acceptance, predicted.accepted.shape[1])
    # Responses are independent, so variances add up. The last term leaves room for rounding where nothing is random.
    half = NormalDist().inv_cdf((1 + level) / 2) * float(variance.sum()) ** 0.5 + 1e-4 * float(mean.sum())
    rounds, tokens = float(measured.rounds.sum()), float(measured.tokens.sum())
    interval = (tokens / (rounds + half), tokens / max(rounds - half, 1.0))
    return _in_interval(criterion, predicted.tau, interval)


def agree_over_prompts(
    measured: Counts, *, predicted: Counts, groups: Sequence[str], level: float, what: str
) -> Agreement:
    """Compares means over the same prompts, where live's responses may differ from those of replay.

    Args:
        measured: live counts at this K.
        predicted: replay's counts for the same prompts.
        groups: [n] the prompt of each response.
        level: probability that a correct decode agrees.
        what: names the comparison in the criterion.
    """
    prompts = len({group for group, rounds in zip(groups, measured.rounds, strict=True) if rounds})
    criterion = f"{level:.2%} interval of the difference by prompt, {what}"
    if prompts < FEWEST_PROMPTS:
        untold = f"{criterion}: {prompts} prompts are too few to tell, {FEWEST_PROMPTS} are needed"
        return Agreement(criterion=criterion, predicted_tau=predicted.tau, untold=untold)
    before, after = (
        np.stack([by_group(side.tokens, groups), by_group(side.rounds, groups)], axis=1)  # [prompts, 2]
        for side in (predicted, measured)
    )
    # The last term leaves room for rounding where all prompts differ by the same ratio.
    half = difference_half_width(before, after, level=level) + 1e-4 * measured.tau
    return _in_interval(criterion, predicted.tau, (measured.tau - half, measured.tau + half))


def agree_on_both(given_tokens: Agreement, own: Agreement) -> Agreement:
    """Combines the two criteria at T > 0 into one verdict.

    Args:
        given_tokens: over live's own responses.
        own: over the verifier's own responses to the same prompts.
    """
    return attrs.evolve(
        given_tokens,
        criterion=f"{given_tokens.criterion}; {own.criterion}",
        own_tau=own.predicted_tau,
        own_interval=own.interval,
        gap="; ".join(filter(None, (given_tokens.gap, own.gap))),
        untold="; ".join(filter(None, (given_tokens.untold, own.untold))),
    )


def _in_interval(criterion: str, predicted: float, interval: tuple[float, float]) -> Agreement:
    low, high = interval
    inside = low <= predicted <= high
    gap = "" if inside else f"replay predicts {predicted:.4f}, it must be {low:.4f} to {high:.4f} ({criterion})"
    return Agreement(criterion=criterion, predicted_tau=predicted, interval=interval, gap=gap)


def is_near_tie(
    engine: RespondingVerifier, head: VerifierHead, row: JudgedResponse, place: int, token: int, *, rough: bool = False
) -> bool:
    """Whether the verifier's logits of its own token at `place` of the response and of `token` differ by rounding.

    Args:
        rough: by the rounding of 16 bits, even where the verifier computes more.
    """
    response = row.response
    seen = torch.tensor(response.tokens[: response.prompt_length + place])  # [n]
    ((_, _, last),) = engine.capture_all([seen], (), longest=None)  # [n, H]
    logits = head.logits(last[-1:].to(head.weight.dtype))[0]  # [V]
    exact = engine.dtype == torch.float32 and not rough
    allowed = NEAR_TIE_LOGITS if exact else NEAR_TIE_SHARE * float(logits.abs().max())
    return abs(float(logits[response.answer[place]] - logits[token])) <= allowed


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
