"""Finds the best K of a speculator that is on disk, in this process or for running servers."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from speculators.cpu import sharing_the_cpu
from speculators.errors import RecipeError
from speculators.events import Progress
from speculators.model import SpeculatorModel
from speculators.pipeline.bench import timed_apart
from speculators.pipeline.measure import SavedSpeculator, find_servers, load_saved, suite_workloads, verifier_of
from speculators.recipe.plan import with_own_sampling
from speculators.recipe.schema import BenchmarkSection
from speculators.runs.tunings import known_taus
from speculators.servers.endpoint import Endpoint
from speculators.tune.result import ServedTuning, TuneResult
from speculators.tune.run import tune_in_process
from speculators.tune.served import tune_servers
from speculators.verifier.sources import config_facts


@sharing_the_cpu()
def tune_folder(
    subject: SavedSpeculator, section: BenchmarkSection, *, k_max: int | None, measured: int, progress: Progress
) -> TuneResult:
    """Finds the fastest K for decoding in this process.

    Args:
        k_max: the largest K to consider; None for the most that the algorithm drafts or, if it has no such limit, the
            largest of the section.
        measured: number of K to measure by real decoding.

    Raises:
        SpeculatorsError: speculator or verifier cannot be loaded, the algorithm lacks a hook, or drafts fewer tokens.
    """
    model, engine = load_saved(subject, ks=() if k_max is None else (k_max,), progress=progress)
    section = with_own_sampling(section, engine.facts)

    def load() -> SpeculatorModel:
        saved = SpeculatorModel.from_pretrained(subject.folder, verifier=engine.folder)
        saved.config = model.config
        return saved

    limit = model.config.max_drafts()
    most = limit[0] if limit else max(section.num_speculative_tokens)
    return tune_in_process(
        model,
        engine,
        section,
        name=subject.name,
        k_max=k_max or most,
        measured=measured,
        timed=timed_apart(section, engine, load, verifier_of(subject)),
        progress=progress,
    )


def tune_endpoints(
    subject: SavedSpeculator,
    section: BenchmarkSection,
    *,
    engine: str,
    endpoints: Sequence[Endpoint],
    baseline_endpoint: Endpoint,
    limit: int,
    num_speculative_tokens: int | None = None,
    take: int | None = None,
    progress: Progress,
) -> ServedTuning:
    """Finds the best K for each batch size of running servers, from the exact acceptance lengths that the run holds.

    Args:
        engine: one of `ENGINES`.
        endpoints: servers with the speculator, each started with another K.
        baseline_endpoint: the server with the verifier alone.
        limit: the largest number of prompts under way at once.
        num_speculative_tokens: K, for a server that does not report it.
        take: use only that many prompts of the suite, the first ones; None for all.

    Raises:
        SpeculatorsError: the run holds no acceptance length, the suite cannot be obtained, or a server fails.
    """
    section = with_own_sampling(section, config_facts(verifier_of(subject), progress=progress))
    suite, temperature = section.suites[0], section.temperatures[0]
    taus = {} if subject.run is None else known_taus(subject.run, suite.name, temperature)
    if not taus:
        raise RecipeError(
            f"{subject.name} holds no acceptance length on {suite.name} at T={temperature:g} to predict from; "
            "run spec tune RUN without --endpoint first: it measures every K"
        )
    drafting, plain = find_servers(engine, endpoints, baseline_endpoint)
    first = attrs.evolve(section, suites=(suite,))
    (workload,) = suite_workloads(subject, first, concurrency=1, take=take, progress=progress)
    return tune_servers(
        drafting,
        plain,
        attrs.evolve(workload, temperature=temperature),
        taus,
        name=subject.name,
        limit=limit,
        num_speculative_tokens=num_speculative_tokens,
        progress=progress,
    )
