"""A run's suite put to a running server; what came of it is filed in the run, beside the in-process benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.suites import load_suite, prompts_digest
from speculators.data.template import ChatTemplate
from speculators.errors import RecipeError, ServerError
from speculators.events import Progress
from speculators.files.disk import disk_errors, write_json
from speculators.pipeline.measure import Subject, verifier_of
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.runs.stages import served_folder
from speculators.servers.benchmark import Questions, Server, measure_served
from speculators.servers.counters import ENGINES
from speculators.servers.endpoint import Endpoint
from speculators.servers.result import ServedResult
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import obtain
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer

# Of sampling and of the bootstrap, as of the in-process benchmark of a folder.
SEED = 0


@attrs.frozen(kw_only=True)
class Service:
    """The servers that a benchmark asks.

    Attributes:
        engine: their kind, of `ENGINES`.
        endpoint: of the server with the speculator; `baseline`, of one without it, None for none.
        model: as the server calls it; None takes the only one; `baseline_model`, as the other one does.
        concurrency: prompts under way at once.
        num_speculative_tokens: K, where the server does not tell it.
        take: the first so many prompts of each suite; None for all.
    """

    engine: str
    endpoint: Endpoint
    baseline: Endpoint | None = None
    model: str | None = None
    baseline_model: str | None = None
    concurrency: int = 1
    num_speculative_tokens: int | None = None
    take: int | None = None


def measure_endpoint(
    subject: Subject, section: BenchmarkSection, service: Service, *, progress: Progress
) -> dict[str, Any]:
    """Returns the benchmark of a running server as JSON values.

    Raises:
        SpeculatorsError: the verifier's tokenizer or a suite cannot be had; or a server fails, in its own words.
    """
    if service.engine not in ENGINES:
        raise RecipeError(f"no engine {service.engine!r} (there are: {', '.join(ENGINES)})")
    server = Server.find(service.engine, service.endpoint, service.model)
    baseline = None
    if service.baseline is not None:
        baseline = Server.find(service.engine, service.baseline, service.baseline_model, option="--baseline-model")
        if baseline.version != server.version:
            told = f"{baseline.endpoint.url} runs {baseline.version}, {server.endpoint.url} {server.version}"
            raise ServerError(f"{told}: no speed-up of the speculator alone", hint="start both with one version")
    verifier = verifier_of(subject)
    trust = verifier.trust_remote_code
    # The server has the weights; here the tokenizer is enough.
    folder = (
        fetch_tokenizer(verifier.model, verifier.revision, trust_remote_code=trust)
        if verifier.kind == "hub"
        else obtain(verifier, progress=progress)
    )
    template = ChatTemplate.of(load_tokenizer(folder, trust_remote_code=trust))
    stop_ids = folder_stop_ids(folder, trust_remote_code=trust)
    settings = []
    for suite in section.suites:
        questions = _questions(suite, section, service, template, stop_ids)
        for temperature in section.temperature:
            settings.append(measure_served(server, baseline, questions, temperature, progress=progress))
    return ServedResult(
        speculator=subject.name,
        verifier=verifier.model,
        engine=server.engine.name,
        version=server.version,
        model=server.model,
        endpoint=server.endpoint.url,
        baseline_endpoint=None if baseline is None else baseline.endpoint.url,
        baseline_model=None if baseline is None else baseline.model,
        concurrency=service.concurrency,
        max_new_tokens=section.max_new_tokens,
        seed=SEED,
        settings=tuple(settings),
    ).to_json()


def file_served(run: Path, result: dict[str, Any]) -> Path:
    """Keeps a benchmark of a server in a run's folder, in place of an earlier one of the same; returns the file."""
    folder = served_folder(run)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    asked = [
        [setting[key] for key in ("suite", "prompts_digest", "num_speculative_tokens", "temperature")]
        for setting in result["settings"]
    ]
    same = fingerprint({"settings": asked, "concurrency": result["concurrency"], "tokens": result["max_new_tokens"]})
    version = re.sub(r"[^\w.+-]", "_", result["version"])
    file = folder / f"{result['engine']}-{version}-{same[:8]}.json"
    write_json(file, result)
    return file


def _questions(
    suite: Suite, section: BenchmarkSection, service: Service, template: ChatTemplate, stop_ids: tuple[int, ...]
) -> Questions:
    prompts = load_suite(suite)
    return Questions(
        suite=suite.name,
        prompts=prompts[: service.take],
        suite_digest=prompts_digest(prompts),
        template=template,
        max_new_tokens=section.max_new_tokens,
        stop_ids=stop_ids,
        seed=SEED,
        concurrency=service.concurrency,
        num_speculative_tokens=service.num_speculative_tokens,
    )
