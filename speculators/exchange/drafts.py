"""Chooses how many tokens an export drafts per round (K), from what its run has measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from speculators.bench.conclusion import best_k, reliable_speed_up
from speculators.bench.result import Setting
from speculators.errors import ArtifactError
from speculators.formats.server_layout import VLLM
from speculators.recipe.checks import too_many_drafts
from speculators.runs.background import Background
from speculators.tune.result import BatchRange

# Time of one more drafted token in steps of plain decoding, where no time was measured reliably: a guess.
GUESSED_COST = 0.1


@attrs.frozen
class ChosenK:
    """The number of tokens that an export drafts per round.

    Attributes:
        k: the number.
        why: where it comes from, as the end of a sentence.
        schedule: K of each range of batch sizes, `k` being the largest; () for `k` at every batch size.
    """

    k: int
    why: str
    schedule: tuple[BatchRange, ...] = ()


def choose_k(asked: int | None, background: Background, config: Any, *, server: str) -> ChosenK:
    """Chooses K: the one asked for, otherwise that of `spec tune`, the best that the run measured, or config.json's.

    Args:
        asked: the K asked for; None leaves the choice to the measurements.
        background: the run's benchmarks and tuning.
        config: of the speculator.
        server: VLLM or SGLANG.

    Raises:
        ArtifactError: the algorithm drafts fewer tokens per round.
    """
    if asked is not None:
        if problem := too_many_drafts(config, [asked]):
            raise ArtifactError(f"--k {problem}")
        return ChosenK(asked, "as asked by --k")
    if (tuned := _tuned(background, config, server)) is not None:
        return tuned
    settings = background.settings
    # A benchmark may have measured more drafts than a server makes of a shorter block.
    usable = [each for each in settings if not too_many_drafts(config, [each.num_speculative_tokens])]
    if not usable:
        tokens = config.speculators_config.proposal_methods[0].speculative_tokens
        return ChosenK(tokens, "which config.json names; no K was measured")
    best = best_k(usable)
    if best is not None and _all_timed(usable, best):
        return ChosenK(best, "the fastest that the run measured")
    k = max(sorted({each.num_speculative_tokens for each in usable}), key=lambda k: _worth(usable, k))
    return ChosenK(k, f"the best by tau / (1 + {GUESSED_COST:g} K): a guess at its cost, since no time is reliable")


def _tuned(background: Background, config: Any, server: str) -> ChosenK | None:
    """Takes K as `spec tune` chose it for this kind of server, otherwise in process; None without either."""
    served, in_process = background.tuning.served, background.tuning.in_process
    if served is not None and served.engine == server and served.most and not too_many_drafts(config, [served.most]):
        # Only vLLM changes K with the batch size.
        schedule = served.schedule if server == VLLM and len(served.schedule) > 1 else ()
        return ChosenK(served.most, f"which spec tune measured on {server} {served.version}", schedule)
    if in_process is None or too_many_drafts(config, [in_process.best.num_speculative_tokens]):
        return None
    return ChosenK(in_process.best.num_speculative_tokens, "the fastest that spec tune found in process")


def _all_timed(settings: Sequence[Setting], k: int) -> bool:
    return all(reliable_speed_up(each) is not None for each in settings if each.num_speculative_tokens == k)


def _worth(settings: Sequence[Setting], k: int) -> float:
    """Mean acceptance length for the time of a round of K drafts, in steps of plain decoding."""
    taus = [each.exact.tau for each in settings if each.num_speculative_tokens == k]
    return sum(taus) / len(taus) / (1 + GUESSED_COST * k)
