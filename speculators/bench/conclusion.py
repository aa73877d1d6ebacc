"""What a benchmark recommends: the K to serve with, and what one more drafted token costs and has to gain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs

from speculators.bench.result import Setting

# A K that nobody measured is only worth a try where the measured costs promise more than their own noise.
WORTH_A_TRY = 1.03


@attrs.frozen(kw_only=True)
class Conclusion:
    """The conclusion from the settings of one suite and temperature.

    Attributes:
        best: the fastest setting; where no time is reliable, the one with the longest acceptance length.
        speed_up: of `best`; None where it was not measured, or not reliably.
        extra_cost: time of one more drafted token, draft and verification, in steps of plain decoding; None where
            rounds of two K were not timed, or where the difference is noise.
        pays_above: share of the rounds that have to accept one more drafted token for decoding to become faster; None
            without `speed_up` and `extra_cost`.
        untried: a K below the largest that was not measured and should be clearly faster than `best` by these costs.
    """

    best: Setting
    speed_up: float | None
    extra_cost: float | None
    pays_above: float | None
    untried: int | None


def reliable_speed_up(setting: Setting) -> float | None:
    """Returns the measured speed-up; None without one, and where it exceeds the acceptance length, as none can."""
    if setting.live is None or setting.live.speed.unmatched_baseline:
        return None
    return setting.live.speed.speed_up


def conclude(settings: Sequence[Setting]) -> Conclusion:
    """Draws the conclusion from the settings of one suite and temperature; there is at least one."""
    rising = sorted(settings, key=lambda setting: setting.num_speculative_tokens)
    best = max(rising, key=_merit)
    speed_up = reliable_speed_up(best)
    costs = [each.drafted_cost for each in rising if each.live is not None]
    cost = costs[-1] if costs else None
    return Conclusion(
        best=best,
        speed_up=speed_up,
        extra_cost=cost,
        # (tau + p) / (steps + cost) > tau / steps, the speed-up; below 1 plain decoding is the one to beat.
        pays_above=cost * max(1.0, speed_up) if cost is not None and speed_up is not None else None,
        untried=_untried(rising, best, cost, speed_up) if cost is not None and speed_up is not None else None,
    )


def best_k(settings: Iterable[Setting]) -> int | None:
    """Returns the K with the greatest mean speed-up over suites and temperatures; None without settings.

    K that were not measured everywhere do not count, and where speed-ups are lacking the acceptance length decides.
    """
    places: dict[tuple[str, float], dict[int, Setting]] = {}
    for each in settings:
        places.setdefault((each.suite, each.temperature), {})[each.num_speculative_tokens] = each
    if not places:
        return None
    common = sorted(set.intersection(*(set(by_k) for by_k in places.values())))
    # Without a K in common the largest of all is as good a guess as any.
    if not common:
        return max(k for by_k in places.values() for k in by_k)
    merits = {k: [_merit(by_k[k]) for by_k in places.values()] for k in common}
    # Products, because speed-ups are ratios; a K is timed only where it was timed everywhere.
    return max(common, key=lambda k: (min(timed for timed, _ in merits[k]), math.prod(value for _, value in merits[k])))


def _merit(setting: Setting) -> tuple[bool, float]:
    """Ranks a setting: reliably timed ones first, by their speed-up; the others by acceptance length."""
    speed_up = reliable_speed_up(setting)
    if speed_up is not None:
        return True, speed_up
    tau = setting.exact.tau
    return False, 0.0 if math.isnan(tau) else tau


def _untried(rising: Sequence[Setting], best: Setting, cost: float, speed_up: float) -> int | None:
    """Finds a K between 1 and the largest that should beat `best`: rounds get shorter and accept a little less."""
    rates = rising[-1].exact.by_position
    measured = [each.num_speculative_tokens for each in rising]
    tau = [1.0]
    for rate in rates:
        tau.append(tau[-1] + rate)
    k_best = best.num_speculative_tokens
    # Plain steps that a round of k drafts takes.
    steps = [tau[k_best] / speed_up + (k - k_best) * cost for k in range(len(tau))]
    gains = {k: tau[k] / steps[k] / speed_up for k in range(1, len(tau)) if k not in measured and steps[k] > 0}
    k = max(gains, key=lambda each: gains[each], default=None)
    return k if k is not None and gains[k] > WORTH_A_TRY else None
