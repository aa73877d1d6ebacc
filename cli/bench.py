"""Measures acceptance of a run's speculator, or of a checkpoint: exact by replay, confirmed live, beside baselines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import RecipeError

from .common import count, print_json, recipe_of, speculator_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="a run folder, or a folder with a speculator")
    parser.add_argument("--verifier", metavar="MODEL", help="instead of the one that config.json names")
    parser.add_argument(
        "--suite", metavar="NAME", action="append", help="a suite's name or a JSONL file; several times"
    )
    parser.add_argument("--k", metavar="K", type=count, action="append", help="tokens drafted a round; several times")
    parser.add_argument("--temperature", metavar="T", type=float, action="append", help="several times")
    parser.add_argument("--prompts", metavar="N", type=count, help="the first N prompts of each suite")
    parser.add_argument("--live", metavar="N", type=count, help="prompts that the live decode confirms")
    parser.add_argument("--against", metavar="NAME,NAME", help="training-free baselines beside it")
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the result here as JSON, too")


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    folder = speculator_of(options.checkpoint)
    recipe = recipe_of(folder)
    section = _section(options, recipe)
    from speculators.pipeline.measure import Subject, measure_folder
    from speculators.report.bench import bench_tables
    from speculators.report.console import console
    from speculators.report.progress import RunView

    with RunView(quiet=options.quiet) as view:
        subject = Subject(folder=folder, recipe=recipe, verifier=options.verifier)
        result = measure_folder(subject, section, progress=view)
    if options.out:
        from speculators.data.files import write_json

        write_json(options.out, result)
    if options.json:
        print_json(result)
    else:
        console().print(bench_tables(result))
    return 0 if result["agrees"] else 1


def _section(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Returns `[benchmark]` of the run's own plan with what the command line replaces."""
    from speculators.recipe.converter import structure
    from speculators.recipe.schema import BenchmarkSection, Suite
    from speculators.recipe.sources import is_file_path

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
