"""Exports a speculator in a server's layout, with the command that serves it; refuses what a server would misread."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import RecipeError
from speculators.formats.server_layout import TARGETS
from speculators.recipe.input_sections import VerifierSection
from speculators.runs.places import find_speculator, recipe_of

from .common import RUN_HELP, count, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help=f"{RUN_HELP}; or a folder with a speculator")
    text = "layout to write: vllm (= speculators) is the layout of a run's speculator/; hub adds a model card"
    parser.add_argument("--to", choices=TARGETS, required=True, help=text)
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="folder to write (default: beside the speculator, with -TARGET)"
    )
    parser.add_argument(
        "--verifier", metavar="MODEL", help="check against this verifier instead of the one in config.json"
    )
    parser.add_argument("--verifier-name", metavar="NAME", help="hub id under which the export names the verifier")
    text = "tokens drafted per round (default: the best that the run measured)"
    parser.add_argument("--k", metavar="K", type=count, help=text)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: bfloat16)")
    parser.add_argument("--push", metavar="REPO", help="with --to hub: upload to this repository")


def run(options: argparse.Namespace) -> int:
    """Writes the export and prints the command that serves it."""
    if options.push and options.to != "hub":
        raise RecipeError("--push needs --to hub: a repository has a model card")
    # Before torch is imported, so that a wrong name is reported at once.
    speculator = find_speculator(options.checkpoint)
    recipe = recipe_of(speculator)
    from speculators.exchange.export import ExportRequest, export
    from speculators.exchange.hub import push
    from speculators.runs.background import background_of

    folder = speculator.absolute()
    section, verifier = _verifier(options, speculator, recipe)
    done = export(
        ExportRequest(
            speculator=speculator,
            target=options.to,
            out=options.out or folder.with_name(f"{folder.name}-{options.to}"),
            name=folder.name if recipe is None else folder.parent.name,
            verifier=verifier,
            section=section,
            verifier_name=options.verifier_name,
            dtype=options.dtype,
            k=options.k,
            address=options.push,
            background=background_of(speculator),
        )
    )
    pushed = push(done.folder, options.push) if options.push else None
    if options.json:
        print_json({**attrs.asdict(done), "pushed": pushed})
        return 0
    if not options.quiet:
        for note in done.notes:
            print(f"note: {note}")
        print(f"drafts {done.num_speculative_tokens} tokens per round, {done.why_k}; serve.md lists the others")
        print(f"{done.folder}{f', pushed: {pushed}' if pushed else ''}")
    print(done.command)
    return 0


def _verifier(
    options: argparse.Namespace, speculator: Path, recipe: dict[str, Any] | None
) -> tuple[VerifierSection, Path | None]:
    """Obtains the verifier given by --verifier; otherwise looks for the run's own on this machine.

    Returns:
        Its section, with the chat template of the run, and its folder.
    """
    from speculators.exchange.export import find_verifier
    from speculators.model import read_config
    from speculators.pipeline.measure import SavedSpeculator, import_algorithm, verifier_of
    from speculators.report.progress import RunView
    from speculators.verifier.sources import obtain

    if recipe is not None:
        import_algorithm(recipe["algorithm"], speculator.parent)
    section = verifier_of(SavedSpeculator(folder=speculator, recipe=recipe, verifier=options.verifier))
    if options.verifier:
        with RunView(quiet=options.quiet) as view:
            return section, obtain(section, progress=view)
    config = read_config(speculator).speculators_config
    return section, find_verifier(section, config.verifier.name_or_path if config else "")
