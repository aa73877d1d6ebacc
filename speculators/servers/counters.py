"""What a server's /metrics tell of its rounds: counters read before and after, by the names of each engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import attrs

from speculators.errors import ServerError

# name{label="value",...} number; a timestamp may follow.
_SAMPLE = re.compile(r'^([A-Za-z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

# A server counts a step a moment after it has sent it.
SETTLE_SECONDS = 0.2
SETTLE_TRIES = 50

Samples = Mapping[str, Mapping[str, float]]


@attrs.frozen(kw_only=True)
class Engine:
    """How an engine calls what is read; where a name is None it does not tell.

    Attributes:
        name: as `--engine` takes it.
        generated: tokens of all answers.
        rounds: verifications that had a draft.
        drafted: tokens drafted; `accepted`, of them accepted.
        by_position: accepted, with a label `position` from 0.
        version: path and key of the version.
        enable: what must be set for the counters to be there.
    """

    name: str
    generated: str
    rounds: str
    drafted: str | None
    accepted: str | None
    by_position: str | None
    version: tuple[str, str]
    enable: str


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            generated="vllm:generation_tokens",
            rounds="vllm:spec_decode_num_drafts",
            drafted="vllm:spec_decode_num_draft_tokens",
            accepted="vllm:spec_decode_num_accepted_tokens",
            by_position="vllm:spec_decode_num_accepted_tokens_per_pos",
            version=("/version", "version"),
            enable="vllm serve tells them unless --disable-log-stats is given",
        ),
        Engine(
            name="sglang",
            generated="sglang:generation_tokens",
            rounds="sglang:spec_verify_calls",
            drafted=None,
            accepted=None,
            by_position=None,
            version=("/get_server_info", "version"),
            enable="sglang.launch_server --enable-metrics tells them, of a version that counts verify calls; its gauge "
            "spec_accept_length is a mean over the last moments only, and no use for a benchmark",
        ),
    )
}


@attrs.frozen(kw_only=True)
class Counted:
    """Rounds of one or more answers.

    Attributes:
        generated: tokens of the answers, their first ones included.
        rounds: verifications of a draft.
        drafted, accepted: tokens; None where the engine does not tell. Accepted drafts past an answer's end count.
        by_position: accepted, by position; () where it does not tell.
    """

    generated: float
    rounds: float
    drafted: float | None
    accepted: float | None
    by_position: tuple[float, ...]

    def since(self, before: Counted) -> Counted:
        """Returns what was counted after `before`; raises ServerError if the server was started anew between."""
        if self.generated < before.generated or self.rounds < before.rounds:
            raise ServerError("the server's counters went back: it was started anew in the middle of the benchmark")
        known = before.by_position or (0.0,) * len(self.by_position)
        return Counted(
            generated=self.generated - before.generated,
            rounds=self.rounds - before.rounds,
            drafted=None if self.drafted is None else self.drafted - (before.drafted or 0.0),
            accepted=None if self.accepted is None else self.accepted - (before.accepted or 0.0),
            by_position=tuple(now - then for now, then in zip(self.by_position, known, strict=True)),
        )


def parse(text: str) -> dict[str, dict[str, float]]:
    """Returns the samples of Prometheus text by name, without `_total`: the label `position` ("" without) -> the sum.

    Other labels (model, engine, rank) are summed over.
    """
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        name, labels, number = sample.groups()
        position = dict(_LABEL.findall(labels or "")).get("position", "")
        held = found.setdefault(name.removesuffix("_total"), {})
        held[position] = held.get(position, 0.0) + float(number)
    return found


def count(engine: Engine, text: str, *, speculates: bool) -> Counted:
    """Reads an engine's counters from the text of /metrics.

    Args:
        speculates: the server is meant to draft; one that does not has no counters of it.

    Raises:
        ServerError: a counter that is needed is not there, and how to have it.
    """
    samples = parse(text)
    if engine.generated not in samples:
        raise ServerError(
            f"/metrics has no {engine.generated}_total: is this a server of {engine.name}?", hint=engine.enable
        )
    if speculates and engine.rounds not in samples:
        raise ServerError(
            f"/metrics has no {engine.rounds}_total: the server does not draft, or does not tell", hint=engine.enable
        )
    positions = samples.get(engine.by_position or "", {})
    return Counted(
        generated=_total(samples, engine.generated),
        rounds=_total(samples, engine.rounds),
        drafted=None if engine.drafted is None else _total(samples, engine.drafted),
        accepted=None if engine.accepted is None else _total(samples, engine.accepted),
        by_position=tuple(positions[key] for key in sorted((key for key in positions if key.isdecimal()), key=int)),
    )


def settled(read: Callable[[], Counted]) -> Counted:
    """Reads counters until they stand still; raises ServerError if they do not, since then others use the server."""
    held = read()
    for _ in range(SETTLE_TRIES):
        time.sleep(SETTLE_SECONDS)
        now = read()
        if now == held:
            return now
        held = now
    raise ServerError("the server's counters do not stand still while nothing is asked of it: others use it, too")


def _total(samples: Samples, name: str) -> float:
    return sum(samples.get(name, {}).values())
