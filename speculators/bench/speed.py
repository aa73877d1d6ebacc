"""Tokens per second with and without a speculator, from one interleaved run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from speculators.decoding.loop import Decoded
from speculators.structure.faults import FloatOrNaN


@attrs.frozen(kw_only=True)
class Speed:
    """Speeds of one contender and of plain decoding: same device, engine, prompts and sampling; prefill included.

    Attributes:
        plain: tokens per second without drafting.
        speculative: tokens per second with it.
        tau: acceptance length of the timed responses.
        speed_up: speculative / plain, carried over from these responses to the suite: their rounds took this long, and
            there they emit the suite's acceptance length instead of `tau`. A few responses may be easier or harder to
            draft than the others.
        draft_seconds: the drafter's time per round.
        verify_seconds: the verifier's time per round.
        unmatched_baseline: whether speculative / plain exceeds `tau`, which no fair comparison can: a round costs at
            least one forward of the verifier.
        dtype: of both decodes; None for that of the benchmark.
        near_ties: responses that left the verifier's own, in the benchmark's dtype, by rounding in another one.
    """

    plain: float
    speculative: float
    tau: FloatOrNaN
    speed_up: float
    draft_seconds: float
    verify_seconds: float
    unmatched_baseline: bool
    dtype: str | None = None
    near_ties: int = 0


def tokens_per_second(responses: Sequence[Decoded]) -> float:
    """Divides all emitted tokens by the wall-clock seconds of their responses."""
    return sum(len(response.tokens) for response in responses) / sum(response.seconds for response in responses)


def compare(
    plain: Sequence[Decoded], speculative: Sequence[Decoded], *, tau: float, suite_tau: float, dtype: str | None = None
) -> Speed:
    """Compares two runs over the same prompts.

    Args:
        plain: decoded without drafts.
        speculative: decoded with drafts.
        tau: acceptance length of the speculative run; NaN without a round.
        suite_tau: that of the whole suite, by replay.
        dtype: of both decodes; None for that of the benchmark.
    """
    before, after = tokens_per_second(plain), tokens_per_second(speculative)
    # Responses of one token have no round; then nothing was drafted either, and the times are 0.
    rounds = max(1, sum(len(response.rounds) for response in speculative))
    is_drafted = not math.isnan(tau)
    return Speed(
        plain=before,
        speculative=after,
        tau=tau,
        speed_up=after / before * (suite_tau / tau if is_drafted else 1.0),
        draft_seconds=sum(response.draft_seconds for response in speculative) / rounds,
        verify_seconds=sum(response.verify_seconds for response in speculative) / rounds,
        unmatched_baseline=after / before > tau,
        dtype=dtype,
    )
