"""Measures acceptance and speed of a speculator on a running server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from speculators.bench.result import sampling
from speculators.bench.statistics import bootstrap_ratio
from speculators.bench.suites import prompts_digest
from speculators.errors import ServerError
from speculators.events import Progress, ignore
from speculators.servers.counters import DraftCounters, read_counters, settled_counters
from speculators.servers.endpoint import Endpoint
from speculators.servers.engines import ENGINES, EngineMetrics, list_models, read_version
from speculators.servers.load import ServingSpeed, Workload, measure_speed, run_workload, warm_up
from speculators.servers.result import ServedAcceptance, ServedSetting
from speculators.servers.streaming import Completion


@attrs.frozen(kw_only=True)
class Server:
    """A server to measure.

    Attributes:
        engine: the names of its metrics.
        endpoint: its address.
        model: the name that requests must use.
        version: of the engine; "unknown" if the server does not report it.
    """

    engine: EngineMetrics
    endpoint: Endpoint
    model: str
    version: str

    @classmethod
    def find(cls, engine: str, endpoint: Endpoint, model: str | None, *, option: str = "--model") -> Server:
        """Asks a server for its model and version.

        Args:
            engine: a key of `ENGINES`.
            endpoint: its address.
            model: None selects the only model that the server offers.
            option: the option by which a user selects a model, for the hint.

        Raises:
            ServerError: the server cannot be reached, offers several models, or does not offer `model`.
        """
        offered = [str(entry["id"]) for entry in list_models(endpoint)]
        if (model is None and len(offered) != 1) or (model is not None and model not in offered):
            raise ServerError(f"{endpoint.url} offers the models {offered}", hint=f"select one by {option} NAME")
        metrics = ENGINES[engine]
        version = read_version(endpoint, *metrics.version) or "unknown"
        return cls(engine=metrics, endpoint=endpoint, model=model or offered[0], version=version)

    def counters(self, *, speculates: bool) -> DraftCounters:
        """Reads its counters as soon as they stand still."""
        return settled_counters(
            lambda: read_counters(self.engine, self.endpoint.get_text("/metrics"), speculates=speculates)
        )


def benchmark_server(
    server: Server,
    baseline: Server | None,
    workload: Workload,
    *,
    num_speculative_tokens: int | None = None,
    progress: Progress = ignore,
) -> ServedSetting:
    """Runs a workload on a server, and on a baseline that does not draft.

    Args:
        server: serves the speculator.
        baseline: serves the verifier alone; None measures no speed-up.
        workload: the prompts.
        num_speculative_tokens: K, for an engine that does not count accepted tokens by position.
        progress: receives the number of answered prompts.

    Raises:
        ServerError: a server fails, lacks a counter, or serves other requests at the same time.
    """
    answers, counters, speed = _run(server, workload, speculates=True, progress=progress)
    plain = None
    if baseline is not None:
        _, baseline_counters, plain = _run(baseline, workload, speculates=False, progress=progress)
        if baseline_counters.rounds:
            raise ServerError(
                f"{baseline.endpoint.url} drafts, so it cannot be the baseline",
                hint="start it without a speculator",
            )
    k = known_num_speculative_tokens(counters, num_speculative_tokens)
    by_prompt = _by_prompt(answers, counters)
    acceptance = _acceptance(answers, counters, by_prompt, seed=workload.seed)
    speed_up = None if plain is None else speed.tokens_per_second / plain.tokens_per_second
    return ServedSetting(
        suite=workload.suite,
        prompts_digest=prompts_digest(workload.prompts),
        prompt_ids=tuple(prompt.id for prompt in workload.prompts),
        suite_digest=workload.suite_digest,
        num_speculative_tokens=k,
        temperature=workload.temperature,
        definition=_definition(server, k, workload),
        acceptance=acceptance,
        by_prompt=by_prompt,
        pace=speed,
        baseline=plain,
        speed_up=speed_up,
        unmatched_baseline=speed_up is not None and speed_up > acceptance.tau,
    )


def _run(
    server: Server, workload: Workload, *, speculates: bool, progress: Progress
) -> tuple[dict[str, list[Completion]], DraftCounters, ServingSpeed]:
    """Runs a workload; returns the answers, the increase of the server's counters, and the speed."""
    # Before the first reading: the warm-up's rounds must not enter the result.
    warm_up(server.endpoint, workload, model=server.model)
    before = server.counters(speculates=speculates)
    answers, seconds = run_workload(server.endpoint, workload, model=server.model, progress=progress)
    counters = server.counters(speculates=speculates).since(before)
    speed = measure_speed(_all(answers), seconds)
    # Counters belong to the server, not to us. Equal token counts show that nobody else used it meanwhile.
    if counters.generated != speed.tokens:
        counts = f"{server.endpoint.url} counts {counters.generated:.0f} tokens, but its answers have {speed.tokens}"
        reason = f"{speed.repeated} answers broke off and were requested again" if speed.repeated else "others use it"
        raise ServerError(
            f"{counts}: {reason}, so the counted rounds are not those of this benchmark alone", hint="measure again"
        )
    return answers, counters, speed


def _all(answers: Mapping[str, Sequence[Completion]]) -> list[Completion]:
    return [answer for turns in answers.values() for answer in turns]


def _acceptance(
    answers: Mapping[str, Sequence[Completion]],
    counters: DraftCounters,
    by_prompt: Mapping[str, tuple[float, float]] | None,
    *,
    seed: int,
) -> ServedAcceptance:
    if not counters.rounds:
        raise ServerError("the server drafted nothing", hint="was it started with the speculator?")
    every = _all(answers)
    # The first token of an answer comes from the prefill and belongs to no round.
    tokens = float(sum(max(0, answer.tokens - 1) for answer in every))
    # Each chunk stands for at least one step. Steps without a draft are not counted by the server, but are rounds too.
    steps = float(sum(answer.steps for answer in every))
    rounds = max(counters.rounds, steps)
    interval = None
    if by_prompt is not None:
        sums = np.array(list(by_prompt.values()))  # [prompts, 2]: tokens, rounds
        interval = bootstrap_ratio(sums[:, 0], sums[:, 1], seed=seed)
    return ServedAcceptance(
        prompts=len(answers),
        responses=len(every),
        tokens=tokens,
        rounds=rounds,
        tau=tokens / rounds,
        tau_interval=interval,
        drafted=None if counters.drafted is None else counters.drafted / rounds,
        by_position=tuple(number / rounds for number in counters.by_position),
        undrafted=rounds - counters.rounds,
    )


def _by_prompt(
    answers: Mapping[str, Sequence[Completion]], counters: DraftCounters
) -> dict[str, tuple[float, float]] | None:
    """Counts tokens and rounds of each prompt; None unless the chunks of all answers add up to the counted rounds."""
    every = _all(answers)
    if any(not answer.arrivals for answer in every):
        return None
    if sum(answer.steps for answer in every) != counters.rounds:
        return None
    return {
        name: (float(sum(max(0, answer.tokens - 1) for answer in turns)), float(sum(answer.steps for answer in turns)))
        for name, turns in answers.items()
    }


def known_num_speculative_tokens(counters: DraftCounters, option: int | None) -> int:
    """Returns K as counted, or as the user says; raises ServerError if neither or both differ."""
    k = len(counters.by_position) or option
    if k is None:
        raise ServerError("the server does not report how many tokens it drafts per round", hint="give --k K")
    if option is not None and option != k:
        raise ServerError(f"the server drafts {k} tokens per round, but --k is {option}")
    return k


def _definition(server: Server, k: int, workload: Workload) -> str:
    return (
        "tau = tokens emitted a round, the verifier's own (bonus) token counted; the first token comes from the "
        f"prefill and belongs to no round; K={k}, {sampling(workload.temperature, workload.token_filter)}; "
        f"rounds: as {server.engine.name} {server.version} counts them ({server.engine.rounds}_total), "
        "tokens: as in its answers; drafts: the server's own way"
    )
