"""Chooses K for every batch size from measurements under a few loads, and writes the choice for vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from speculators.formats.server_layout import PER_BATCH
from speculators.tune.result import BatchChoice, BatchRange, LoadPoint


def relative_cost(points: Sequence[LoadPoint], batch: int, k: int) -> float:
    """Computes the duration of a round of K drafts in steps without drafts, at one batch size.

    Each server that drafts gives the cost of its K at each load. Between loads, durations are interpolated over the
    logarithm of the batch size; outside the measured loads, the nearest load's duration holds. Between two K, the cost
    is interpolated over K, where K = 0 costs one step.

    Args:
        points: by rising load; all have the same K.
        batch: sequences that the server works on at once.
        k: at most the largest K that was measured.
    """
    steps = _curve([(point.in_flight, point.step_seconds) for point in points], batch)
    rounds = [
        _curve([(point.drafting[index].in_flight, point.drafting[index].round_seconds) for point in points], batch)
        for index in range(len(points[0].drafting))
    ]
    measured = [each.num_speculative_tokens for each in points[0].drafting]
    return float(np.interp(k, [0, *measured], [1.0, *(seconds / steps for seconds in rounds)]))


def _curve(pairs: Sequence[tuple[float, float]], batch: int) -> float:
    loads, seconds = zip(*sorted(pairs), strict=True)
    return float(np.interp(math.log(batch), np.log(loads), seconds))


def choose(points: Sequence[LoadPoint], taus: Mapping[int, float], batch: int) -> BatchChoice:
    """Finds the K with the greatest throughput at one batch size; 0 where drafting does not pay.

    Args:
        points: by rising load.
        taus: acceptance length of each K that may be chosen, at most the largest K that was measured.
        batch: sequences that the server works on at once.
    """
    gains = {0: 1.0} | {k: tau / relative_cost(points, batch, k) for k, tau in taus.items()}
    k = max(gains, key=lambda each: gains[each])
    return BatchChoice(batch=batch, num_speculative_tokens=k, predicted=gains[k])


def ranges(ks: Sequence[int]) -> tuple[BatchRange, ...]:
    """Joins neighbouring batch sizes with the same K.

    Args:
        ks: K of batch size 1, 2, ...
    """
    joined: list[BatchRange] = []
    for batch, k in enumerate(ks, start=1):
        if joined and joined[-1][2] == k:
            joined[-1] = (joined[-1][0], batch, k)
        else:
            joined.append((batch, batch, k))
    return tuple(joined)


def off_from(schedule: Sequence[BatchRange]) -> int | None:
    """Finds the batch size from which nothing is drafted; None if the largest one still drafts."""
    first, _, k = schedule[-1]
    return first if k == 0 else None


def vllm_text(schedule: Sequence[BatchRange]) -> str:
    """Writes a schedule as part of the JSON that vLLM's --speculative-config takes."""
    most = max(k for _, _, k in schedule)
    return json.dumps({"num_speculative_tokens": most, PER_BATCH: [list(each) for each in schedule]})[1:-1]
