"""Reads an engine's counters of drafting rounds from /metrics (Prometheus text), before and after a benchmark."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import attrs

from speculators.errors import ServerError
from speculators.servers.engines import EngineMetrics

# name{label="value",...} number; a timestamp may follow.
_SAMPLE = re.compile(r'^([A-Za-z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

# A server updates its counters a moment after it has sent the tokens.
SETTLE_SECONDS = 0.2
SETTLE_TRIES = 50

Samples = Mapping[str, Mapping[str, float]]


@attrs.frozen(kw_only=True)
class DraftCounters:
    """Counters of a server, or their increase over a benchmark.

    Attributes:
        generated: tokens of the answers, first tokens included.
        rounds: verifications of a draft.
        drafted: drafted tokens; None if the engine does not count them.
        accepted: accepted draft tokens, including those past the end of an answer; None if the engine does not count
            them.
        by_position: accepted draft tokens by position; () if the engine does not count them.
    """

    generated: float
    rounds: float
    drafted: float | None
    accepted: float | None
    by_position: tuple[float, ...]

    def since(self, before: DraftCounters) -> DraftCounters:
        """Computes the increase since `before`; raises ServerError if the server was restarted in between."""
        if self.generated < before.generated or self.rounds < before.rounds:
            raise ServerError("the server's counters went backwards: it was restarted during the benchmark")
        # The counters by position appear with the first accepted draft.
        earlier = before.by_position or (0.0,) * len(self.by_position)
        return DraftCounters(
            generated=self.generated - before.generated,
            rounds=self.rounds - before.rounds,
            drafted=None if self.drafted is None else self.drafted - (before.drafted or 0.0),
            accepted=None if self.accepted is None else self.accepted - (before.accepted or 0.0),
            by_position=tuple(now - then for now, then in zip(self.by_position, earlier, strict=True)),
        )


def parse_prometheus(text: str) -> dict[str, dict[str, float]]:
    """Parses Prometheus text into name (without `_total`) -> value of the label `position` ("" if absent) -> sum.

    The values of all other labels (model, engine, rank) are added up.
    """
    samples: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, labels, number = match.groups()
        position = dict(_LABEL.findall(labels or "")).get("position", "")
        sums = samples.setdefault(name.removesuffix("_total"), {})
        sums[position] = sums.get(position, 0.0) + float(number)
    return samples


def read_counters(engine: EngineMetrics, text: str, *, speculates: bool) -> DraftCounters:
    """Picks an engine's counters out of the text of /metrics.

    Args:
        engine: names of its counters.
        text: the response of /metrics.
        speculates: whether the server should draft; one without a speculator has no counters of rounds.

    Raises:
        ServerError: a required counter is missing; the hint says how to enable it.
    """
    samples = parse_prometheus(text)
    if engine.generated not in samples:
        raise ServerError(
            f"/metrics has no {engine.generated}_total: is this a server of {engine.name}?", hint=engine.enable
        )
    if speculates and engine.rounds not in samples:
        raise ServerError(
            f"/metrics has no {engine.rounds}_total: the server does not draft, or does not count its rounds",
            hint=engine.enable,
        )
    positions = samples.get(engine.by_position or "", {})
    return DraftCounters(
        generated=_total(samples, engine.generated),
        rounds=_total(samples, engine.rounds),
        drafted=None if engine.drafted is None else _total(samples, engine.drafted),
        accepted=None if engine.accepted is None else _total(samples, engine.accepted),
        by_position=tuple(positions[key] for key in sorted((key for key in positions if key.isdecimal()), key=int)),
    )


def settled_counters(read: Callable[[], DraftCounters]) -> DraftCounters:
    """Reads counters until two readings agree; raises ServerError if others keep the server busy."""
    before = read()
    for _ in range(SETTLE_TRIES):
        time.sleep(SETTLE_SECONDS)
        now = read()
        if now == before:
            return now
        before = now
    raise ServerError("the server's counters keep changing although this benchmark is idle: others use the server too")


def _total(samples: Samples, name: str) -> float:
    return sum(samples.get(name, {}).values())
