"""Measures servers with and without drafts under rising load, and chooses the best K for each batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from speculators.errors import ServerError
from speculators.events import Pieces, Progress, ignore
from speculators.servers.benchmark import Server, benchmark_server
from speculators.servers.load import ServingSpeed, Workload
from speculators.servers.result import ServedSetting
from speculators.tune.result import DraftingPace, LoadPoint, ServedTuning
from speculators.tune.schedule import choose, off_from, ranges


def concurrencies(limit: int) -> list[int]:
    """Lists the loads to measure: powers of two up to the limit, and the limit itself."""
    return [*_powers(limit), *([limit] if limit & (limit - 1) else [])]


def _powers(limit: int) -> Iterator[int]:
    number = 1
    while number <= limit:
        yield number
        number *= 2


def tune_servers(
    drafting: Sequence[Server],
    plain: Server,
    workload: Workload,
    taus: Mapping[int, float],
    *,
    name: str,
    limit: int,
    num_speculative_tokens: int | None = None,
    progress: Progress = ignore,
) -> ServedTuning:
    """Finds the best K for each batch size from 1 to the largest load.

    Args:
        drafting: servers with the speculator, each started with another K.
        plain: the server without the speculator.
        workload: the prompts; its concurrency is replaced.
        taus: acceptance length by replay of each K that may be chosen.
        name: the speculator's name in the result.
        limit: the largest concurrency.
        num_speculative_tokens: K, for one server of an engine that does not count accepted tokens by position.
        progress: receives progress events.

    Raises:
        ServerError: a server fails, does not time its tokens, or drafts the same K as another.
    """
    if limit > len(workload.prompts):
        message = f"{limit} prompts cannot be sent at once: suite {workload.suite} has {len(workload.prompts)}"
        raise ServerError(message, hint=f"--limit {len(workload.prompts)}, or a larger suite")
    loads = concurrencies(limit)
    pieces = Pieces(stage="tune", pieces=len(loads) * len(drafting), listen=progress)

    def measure(server: Server, load: int) -> ServedSetting:
        loaded = attrs.evolve(workload, concurrency=load)
        k = num_speculative_tokens
        return benchmark_server(server, plain, loaded, num_speculative_tokens=k, progress=pieces.piece(phases=2))

    points = [_point(load, [measure(server, load) for server in drafting]) for load in loads]
    usable = _usable(taus, [each.num_speculative_tokens for each in points[0].drafting])
    schedule = ranges([choose(points, usable, batch).num_speculative_tokens for batch in range(1, limit + 1)])
    return ServedTuning(
        speculator=name,
        engine=plain.engine.name,
        version=plain.version,
        suite=workload.suite,
        temperature=workload.temperature,
        max_new_tokens=workload.max_new_tokens,
        taus=tuple(usable.items()),
        points=tuple(points),
        choices=tuple(choose(points, usable, batch) for batch in loads),
        schedule=schedule,
        off_from=off_from(schedule),
    )


def _usable(taus: Mapping[int, float], measured: Sequence[int]) -> dict[int, float]:
    """Keeps the acceptance lengths of K whose costs are known: up to the largest K that a server drafts."""
    if len(set(measured)) < len(measured):
        raise ServerError(f"the servers draft {measured} tokens per round", hint="start each with another K")
    usable = {k: tau for k, tau in sorted(taus.items()) if k <= max(measured)}
    if not usable:
        raise ServerError(
            f"the servers draft {measured} tokens per round, and replay measured no K up to that: {sorted(taus)}",
            hint="spec tune RUN without --endpoint measures every K",
        )
    return usable


def _point(load: int, settings: Sequence[ServedSetting]) -> LoadPoint:
    """Derives the durations of steps and rounds from the times between tokens.

    The server without drafts was measured beside each other server; its first measurement counts.
    """
    plain = settings[0].baseline
    assert plain is not None, "benchmark_server was given a baseline"
    paces = [
        DraftingPace(
            num_speculative_tokens=each.num_speculative_tokens,
            in_flight=in_flight(each.pace),
            round_seconds=_token_seconds(each.pace) * each.acceptance.tau,
            tau=each.acceptance.tau,
            pace=each.pace,
        )
        for each in settings
    ]
    return LoadPoint(
        concurrency=load,
        in_flight=in_flight(plain),
        step_seconds=_token_seconds(plain),
        plain=plain,
        drafting=tuple(sorted(paces, key=lambda each: each.num_speculative_tokens)),
    )


def in_flight(speed: ServingSpeed) -> float:
    """Computes the mean number of requests under way, by Little's law: seconds of all answers / seconds of the run.

    The time of an answer is the time to its first token plus the times between its tokens.

    Source: Little 1961, A Proof for the Queuing Formula: L = lambda W.
    """
    assert speed.first_token is not None, "checked with the time between tokens"
    between = (speed.tokens - speed.requests) * _token_seconds(speed)
    return (speed.requests * speed.first_token.mean + between) / speed.seconds


def _token_seconds(speed: ServingSpeed) -> float:
    if speed.inter_token is None:
        raise ServerError(
            "the server counts the tokens of an answer only at its end, so its steps cannot be timed",
            hint="vLLM and SGLang count them in each chunk; is there a proxy in between?",
        )
    return speed.inter_token.mean
