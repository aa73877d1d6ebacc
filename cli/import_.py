"""Imports a published speculator (EAGLE, DFlash, Medusa, MTP, upstream's layouts), or explains why it cannot."""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs

from speculators.errors import Problem, RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.input_sections import VerifierSection
from speculators.structure.converter import structure

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("path", metavar="PATH", type=Path, help="folder of the checkpoint, or its safetensors file")
    text = "the model it drafts for: a folder, a hub id, a .gguf file or tiny:SEED"
    parser.add_argument("--verifier", metavar="MODEL", required=True, help=text)
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a hub id")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="folder to write (default: ./NAME-speculator)")


def run(options: argparse.Namespace) -> int:
    """Writes our checkpoint and prints a summary."""
    if not options.path.expanduser().exists():
        raise RecipeError([Problem("", f"{options.path}: no such file or folder", "download the checkpoint first")])
    from speculators.exchange.importing import Verifier, import_checkpoint
    from speculators.report.progress import RunView
    from speculators.verifier.sources import obtain

    section = _section(options)
    with RunView(quiet=options.quiet) as view:
        folder = obtain(section, progress=view)
    name = section.model if section.kind == "hub" else str(folder.resolve())
    verifier = Verifier(folder=folder, name=name, facts=VerifierFacts.read(folder / "config.json"))
    path = options.path.expanduser()
    out = options.out or Path(f"{path.resolve().stem if path.is_file() else path.resolve().name}-speculator")
    done = import_checkpoint(path, verifier, out)
    if options.json:
        print_json({**attrs.asdict(done), "verifier": name})
        return 0
    if not options.quiet:
        taken = f"; {', '.join(done.from_verifier)} from the verifier" if done.from_verifier else ""
        print(f"{done.format}: {done.tensors} tensors{taken}")
        for note in done.notes:
            print(f"note: {note}")
        print(f"spec bench {done.folder} measures it, spec export {done.folder} --to vllm serves it")
    print(done.folder)
    return 0


def _section(options: argparse.Namespace) -> VerifierSection:
    path = Path(options.verifier).expanduser()
    values = {"model": str(path.resolve()) if path.is_dir() else options.verifier}
    if options.revision:
        values["revision"] = options.revision
    section, problems = structure(values, VerifierSection, path=("--verifier",))
    if section is None:
        raise RecipeError(problems)
    return section
