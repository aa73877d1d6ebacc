"""Answers prompts by a recipe's verifier: on-policy conversations, with a file of their provenance."""

from __future__ import annotations

import argparse
from pathlib import Path

from speculators.errors import Problem, RecipeError
from speculators.runs.recipes import load_any

from .common import add_recipe, count, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    text = "JSONL with messages; every answer is written anew (default: the recipe's data.sources)"
    parser.add_argument("prompts", metavar="PROMPTS", type=Path, nargs="?", help=text)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSONL file to write")
    text = "URL of an OpenAI-compatible server of the same verifier (vLLM, SGLang) that answers instead of this process"
    parser.add_argument("--endpoint", metavar="URL", help=text)
    parser.add_argument(
        "--concurrency", metavar="N", type=count, default=32, help="prompts to send at once (default: 32)"
    )


def run(options: argparse.Namespace) -> int:
    """Writes the conversations and prints how many."""
    out = options.out.resolve()
    if options.prompts is not None and out == options.prompts.resolve():
        raise RecipeError([Problem("--out", f"{options.out} is also the file of prompts", "name another file")])
    if out.exists() and not any(out.with_name(out.name + end).is_file() for end in (".json", ".part")):
        message = f"{options.out} exists and was not written by this command"
        raise RecipeError([Problem("--out", message, "name another file, or remove it first")])
    recipe, _ = load_any(options.recipe, options.overrides)
    from speculators.pipeline.regenerate import regenerate_file
    from speculators.report.progress import RunView
    from speculators.servers.endpoint import Endpoint

    with RunView(quiet=options.quiet) as view:
        facts = regenerate_file(
            recipe,
            options.prompts,
            options.out,
            endpoint=Endpoint(url=options.endpoint) if options.endpoint else None,
            concurrency=options.concurrency,
            progress=view,
        )
    if options.json:
        print_json(facts)
    else:
        engine = facts.get("engine")
        whom = f", by {engine['engine']} {engine['version']} with {engine['root'] or engine['model']}" if engine else ""
        print(f"{options.out}: {facts['conversations']} conversations{whom}")
    return 0
