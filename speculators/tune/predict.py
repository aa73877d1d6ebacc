"""Predicts the speed-up of every K from its acceptance length and the cost of its rounds, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np

from speculators.bench.replay import Replayed
from speculators.bench.result import sums_by_prompt
from speculators.bench.statistics import DRAWS
from speculators.tune.costs import RoundTimes
from speculators.tune.result import CandidateK

LEVEL = 0.95


@attrs.frozen(eq=False)
class _Draws:
    """Resampled acceptance lengths and speed-ups, [DRAWS, K_max]; each draw takes the same prompts for all K."""

    taus: np.ndarray
    speed_ups: np.ndarray


def predict(replayed: Mapping[int, Replayed], times: RoundTimes, *, seed: int = 0) -> tuple[CandidateK, ...]:
    """Predicts speed-up(K) = tau(K) / cost(K) for every K.

    A resampled prompt or cycle brings its values of every K, so the spread that all K share cancels out of their
    comparison (`chance_of_best`).

    Args:
        replayed: the replay of each K from 1 to K_max.
        times: of rounds up to K_max.
        seed: of the draws.
    """
    ks = sorted(replayed)
    # [K_max, prompts, 2]: tokens and rounds.
    sums = np.array(
        [list(sums_by_prompt(replayed[k].counts(k), replayed[k].ids).values()) for k in ks], dtype=np.float64
    )
    taus = sums[..., 0].sum(axis=1) / sums[..., 1].sum(axis=1)
    costs = times.costs()[1:]
    draws = _draw(sums, times, np.random.default_rng(seed))
    fastest = draws.speed_ups.argmax(axis=1)
    draft, verify = times.typical(times.draft), times.typical(times.verify)
    return tuple(
        CandidateK(
            num_speculative_tokens=k,
            tau=float(taus[index]),
            tau_interval=_interval(draws.taus[:, index]),
            draft_seconds=float(draft[k]),
            verify_seconds=float(verify[k]),
            cost=float(costs[index]),
            predicted=float(taus[index] / costs[index]),
            predicted_interval=_interval(draws.speed_ups[:, index]),
            chance_of_best=float((fastest == index).mean()),
        )
        for index, k in enumerate(ks)
    )


def _draw(sums: np.ndarray, times: RoundTimes, random: np.random.Generator) -> _Draws:
    prompts, cycles = sums.shape[1], len(times.draft)
    # [DRAWS, prompts]: how often each prompt is drawn.
    often = random.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=DRAWS)
    # A response of one token has no round, so a draw of such prompts alone has no tau.
    rounds = np.maximum(often @ sums[..., 1].T, 1e-12)
    taus = (often @ sums[..., 0].T) / rounds  # [DRAWS, K_max]
    costs = np.array([times.costs(random.integers(cycles, size=cycles))[1:] for _ in range(DRAWS)])
    return _Draws(taus, taus / costs)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


def most_promising(candidates: tuple[CandidateK, ...], number: int) -> list[int]:
    """Picks the K with the greatest predicted speed-ups, in rising order of K."""
    ranked = sorted(candidates, key=lambda each: each.predicted, reverse=True)
    return sorted(each.num_speculative_tokens for each in ranked[:number])
