"""Tokens per second with and without a speculator, from one interleaved run."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from speculators.decoding.loop import Decoded


@attrs.frozen(kw_only=True)
class Speed:
    """Speeds of one contender and of plain decoding: same device, engine, prompts and sampling; prefill included.

    Attributes:
        plain: tokens per second without drafting.
        speculative: tokens per second with it.
        speed_up: speculative / plain.
        draft_seconds: the drafter's time per round.
        verify_seconds: the verifier's time per round.
        unmatched_baseline: whether the speed-up exceeds the acceptance length, which no fair comparison can: a round
            costs at least one forward of the verifier.
        dtype: of both decodes; None for that of the benchmark.
        near_ties: responses that left the verifier's own, in the benchmark's dtype, by rounding in another one.
    """

    plain: float
    speculative: float
    speed_up: float
    draft_seconds: float
    verify_seconds: float
    unmatched_baseline: bool
    dtype: str | None = None
    near_ties: int = 0


def tokens_per_second(responses: Sequence[Decoded]) -> float:
    """Divides all emitted tokens by the wall-clock seconds of their responses."""
    return sum(len(response.tokens) for response in responses) / sum(response.seconds for response in responses)


def compare(plain: Sequence[Decoded], speculative: Sequence[Decoded], *, tau: float, dtype: str | None = None) -> Speed:
    """Compares two runs over the same prompts.

    Args:
        plain: decoded without drafts.
        speculative: decoded with drafts.
        tau: acceptance length of the speculative run.
        dtype: of both decodes; None for that of the benchmark.
    """
    before, after = tokens_per_second(plain), tokens_per_second(speculative)
    # Responses of one token have no round; then nothing was drafted either, and the times are 0.
    rounds = max(1, sum(len(response.rounds) for response in speculative))
    return Speed(
        plain=before,
        speculative=after,
        speed_up=after / before,
        draft_seconds=sum(response.draft_seconds for response in speculative) / rounds,
        verify_seconds=sum(response.verify_seconds for response in speculative) / rounds,
        unmatched_baseline=after / before > tau,
        dtype=dtype,
    )
