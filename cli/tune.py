"""Finds the fastest number of tokens to draft per round (K), here or on running servers; spec export adopts it.

Without --endpoint it decodes in this process: replay gives the exact acceptance length of every K, rounds of all K are
timed in turn, and the most promising K are measured by real decoding. With --endpoint it finds the best K for each
batch size of a server, in the form that vLLM takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import Problem, RecipeError
from speculators.runs.places import find_speculator, recipe_of

from .common import RUN_HELP, count, natural, print_json

_SERVER_OPTIONS = ("engine", "baseline_endpoint", "limit", "k")
_PROCESS_OPTIONS = ("k_max", "live", "measure")
LIMIT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help=f"{RUN_HELP}; or a folder with a speculator")
    text = "a verifier instead of the run's or the one that config.json names"
    parser.add_argument("--verifier", metavar="MODEL", help=text)
    text = "a suite's name, its TOML file or its rows (default: the run's first)"
    parser.add_argument("--suite", metavar="NAME", help=text)
    parser.add_argument("--temperature", metavar="T", type=float, help="default: the run's first")
    parser.add_argument("--prompts", metavar="N", type=count, help="only the first N prompts of the suite")
    text = "largest K to consider (default: the most that the algorithm drafts, else the largest of the recipe)"
    parser.add_argument("--k-max", metavar="K", type=count, help=text)
    text = "number of prompts to decode for timing (default: the run's live_prompts)"
    parser.add_argument("--live", metavar="N", type=count, help=text)
    text = "number of K to measure by real decoding; 0 trusts the prediction (default: 3)"
    parser.add_argument("--measure", metavar="N", type=natural, help=text)
    served = parser.add_argument_group("running servers")
    text = "address of a server with the speculator; may be repeated, for servers that each draft another K"
    served.add_argument("--endpoint", metavar="URL", action="append", help=text)
    served.add_argument("--baseline-endpoint", metavar="URL", help="address of a server with the verifier alone")
    served.add_argument("--engine", choices=("vllm", "sglang"), help="their kind (default: vllm)")
    served.add_argument("--limit", metavar="N", type=count, help=f"most prompts sent at once (default: {LIMIT})")
    served.add_argument("--k", metavar="K", type=count, help="tokens drafted per round, if the server does not say")


def run(options: argparse.Namespace) -> int:
    """Measures, prints, and files the choice in the run."""
    _check(options)
    folder = find_speculator(options.checkpoint)
    recipe = recipe_of(folder)
    section = _section(options, recipe)
    from speculators.pipeline.measure import SavedSpeculator
    from speculators.report.console import console
    from speculators.report.tune import served_tuning_tables, tuning_table
    from speculators.runs.tunings import file_tuning

    subject = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
    result = _serve(subject, section, options) if options.endpoint else _in_process(subject, section, options)
    # Print before writing: a full disk must not cost the measurement.
    if not options.json:
        console().print(served_tuning_tables(result) if options.endpoint else tuning_table(result))
    # A run keeps only a choice for its own verifier on a whole suite.
    of_run = subject.run is not None and not (options.verifier or options.prompts)
    file = file_tuning(subject.run, result) if of_run and subject.run is not None else None
    if options.json:
        document = result.to_json()
        print_json(document if file is None else {**document, "file": file})
    elif file and not options.quiet:
        print(f"{file}: spec export {options.checkpoint} uses this choice")
    return 0


def _in_process(subject: Any, section: Any, options: argparse.Namespace) -> Any:
    from speculators.pipeline.tune import tune_folder
    from speculators.report.progress import RunView

    measured = 3 if options.measure is None else options.measure
    with RunView(quiet=options.quiet) as view:
        return tune_folder(subject, section, k_max=options.k_max, measured=measured, progress=view)


def _serve(subject: Any, section: Any, options: argparse.Namespace) -> Any:
    from speculators.pipeline.tune import tune_endpoints
    from speculators.report.progress import RunView
    from speculators.servers.endpoint import Endpoint

    with RunView(quiet=options.quiet) as view:
        return tune_endpoints(
            subject,
            section,
            engine=options.engine or "vllm",
            endpoints=[Endpoint(url=url) for url in options.endpoint],
            baseline_endpoint=Endpoint(url=options.baseline_endpoint),
            limit=options.limit or LIMIT,
            num_speculative_tokens=options.k,
            take=options.prompts,
            progress=view,
        )


def _check(options: argparse.Namespace) -> None:
    """Refuses options that the kind of measurement would ignore."""
    ignored = _PROCESS_OPTIONS if options.endpoint else _SERVER_OPTIONS
    names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored if getattr(options, name) is not None)
    faults = []
    if names and options.endpoint:
        faults.append(f"{names}: measured in process only; leave it out with --endpoint")
    elif names:
        faults.append(f"{names}: only for running servers: give --endpoint")
    if options.endpoint and not options.baseline_endpoint:
        faults.append("--endpoint needs --baseline-endpoint: costs are relative to a server without drafts")
    if options.k and len(options.endpoint or ()) > 1:
        faults.append("--k is for one server; several must report their own")
    if faults:
        raise RecipeError([Problem("", fault) for fault in faults])


def _section(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Reads the `[benchmark]` of the run's recipe, with the command line's values in it."""
    from speculators.recipe.checks import suite_fault
    from speculators.recipe.schema import BenchmarkSection, suite_values
    from speculators.structure.converter import structure

    values: dict[str, Any] = {"suites": ["quickstart"], **({} if recipe is None else recipe["benchmark"])}
    # Only chains are tuned; the recipe's trees would be refused above temperature 0.
    values["trees"] = []
    if options.suite:
        values["suites"] = [suite_values(options.suite)]
    if options.temperature is not None:
        values["temperature"] = [options.temperature]
    if options.live:
        values["live_prompts"] = options.live
    section, problems = structure(values, BenchmarkSection, path=("benchmark",))
    if section is None:
        raise RecipeError(problems)
    if not section.suites:
        raise RecipeError("the run's recipe names no suite (--suite quickstart measures on one)")
    if fault := suite_fault(section.suites[0]):
        raise RecipeError([Problem("--suite" if options.suite else "benchmark.suites", *fault)])
    if options.prompts and not options.endpoint:
        suite, *others = section.suites
        section = attrs.evolve(section, suites=(attrs.evolve(suite, take=options.prompts), *others))
    return section
