"""Writes a commented recipe for a verifier of your own, from its config.json, and shows what it would do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import attrs

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.cost.catalogue import parse_devices
from speculators.errors import Problem, RecipeError, SpeculatorsError, VerifierError
from speculators.exchange.servable import servers_reading
from speculators.facts import VerifierFacts
from speculators.recipe.checks import check_recipe, check_verifier
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.load import load_recipe
from speculators.recipe.shipped import shipped_facts
from speculators.recipe.starter import Starter, published_dtype, starter_text
from speculators.structure.converter import structure

from .common import add_verifier_config, print_json

# A vocabulary above the first number is reduced to the second, as in the recipes that come with the package.
LARGE_VOCABULARY, DRAFTED = 64_000, 32_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("model", metavar="MODEL", help="the verifier: a folder, a hub id or a .gguf file")
    default = load_recipe("quickstart").algorithm.name
    parser.add_argument(
        "--algorithm", choices=CONFIGS.names(), default=default, help=f"what to train (default: {default})"
    )
    parser.add_argument("--gpus", metavar="LIST", help="the machine, such as 8xH100-80GB: sizes an update")
    text = "conversations to train on (default: a data set of the hub)"
    parser.add_argument("--data", metavar="FILE", type=Path, help=text)
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a hub id")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: ./ALGORITHM_MODEL.toml)")
    add_verifier_config(parser)


def run(options: argparse.Namespace) -> int:
    """Writes the file, checks it, and prints the plan."""
    if options.data is not None and not options.data.is_file():
        raise RecipeError([Problem("--data", f"no such file: {options.data}")])
    folder = (options.out.parent if options.out else Path()).resolve()
    section = _verifier(options, folder)
    facts = _facts(section, options)
    starter = _starter(section, facts, options, folder)
    target = options.out or Path(f"{starter.name}.toml")
    if target.suffix != ".toml":
        raise RecipeError([Problem("--out", f"{target}: the name of a recipe's file must end in .toml")])
    text = starter_text(starter)
    _write(target, text, facts, starter.processes)
    # Without a slash, the name would be looked up in the catalogue.
    path = str(target) if "/" in str(target) else f"./{target}"
    if options.json:
        print_json({"recipe": str(target), "name": starter.name, "text": text})
        return 0
    if not options.quiet:
        print(f"{target}: written; look through it, then: spec data {path}, spec run {path}\n")
    return 0 if options.quiet else _plan(path, options)


def _verifier(options: argparse.Namespace, folder: Path) -> VerifierSection:
    local = Path(options.model).expanduser()
    values: dict[str, Any] = {"model": _place(local, folder) if local.exists() else options.model}
    if options.revision:
        values["revision"] = options.revision
    section, problems = structure(values, VerifierSection, path=("MODEL",))
    if section is None:
        raise RecipeError(problems)
    return section


def _place(path: Path, folder: Path) -> str:
    """Names a path as the recipe does: from its own folder if it lies inside, else from the root."""
    whole = path.resolve()
    return f"./{whole.relative_to(folder)}" if whole.is_relative_to(folder) and whole != folder else str(whole)


def _facts(section: VerifierSection, options: argparse.Namespace) -> VerifierFacts:
    """Reads the verifier's config.json: a file of the command line's, the package's copy, or the model's own."""
    if options.verifier_config:
        return VerifierFacts.read(options.verifier_config)
    if (known := shipped_facts(section)) is not None:
        return known
    # The section's paths start from the recipe's folder.
    local = Path(options.model).expanduser()
    if section.kind == "folder":
        return VerifierFacts.read(local / "config.json")
    from speculators.verifier.sources import fetch_facts

    try:
        return fetch_facts(attrs.evolve(section, model=str(local.resolve())) if section.kind == "gguf" else section)
    except VerifierError as error:
        hint = f"without the model: spec init {options.model} --verifier-config FILE, with its config.json"
        raise VerifierError(str(error), hint=hint) from error


def _starter(section: VerifierSection, facts: VerifierFacts, options: argparse.Namespace, folder: Path) -> Starter:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    if missing := [key for key in needed if not isinstance(facts.get(key), int)]:
        raise VerifierError(f"{facts.source} has no {', '.join(missing)}", hint="is it that of a language model?")
    processes = 1
    if options.gpus:
        processes = parse_devices(options.gpus)[0].count
    config, keys = _algorithm(SpeculatorModelConfig.get_class(options.algorithm), facts)
    return Starter(
        verifier=attrs.evolve(section, dtype=published_dtype(facts) or section.dtype),
        facts=facts,
        config=config,
        keys=keys,
        data=_place(options.data, folder) if options.data else None,
        gpus=options.gpus or "",
        processes=processes,
    )


def _algorithm(kind: Any, facts: VerifierFacts) -> tuple[SpeculatorModelConfig, dict[str, str]]:
    """Chooses the keys of [algorithm]: a smaller vocabulary where that costs no server, values that win one."""
    config, keys = kind(), {}
    plain = attrs.evolve(config, decoder={"hidden_act": "silu"})
    if _servers(plain, facts) > _servers(config, facts):
        config, keys["decoder"] = plain, "the verifier has another activation, which no server's draft layer has"
    if facts.vocab_size > LARGE_VOCABULARY:
        smaller = attrs.evolve(config, draft_vocab_size=DRAFTED)
        if not [*smaller.misfits(facts)] and _servers(smaller, facts) >= _servers(config, facts):
            config = smaller
            keys["draft_vocab_size"] = f"of {facts.vocab_size}: the most frequent ones in the data"
    for field in kind.recipe_fields():
        if field.type in (bool, "bool") and not field.metadata.get("knob"):
            other = attrs.evolve(config, **{field.name: not getattr(config, field.name)})
            if won := _servers(other, facts) - _servers(config, facts):
                config, keys[field.name] = other, f"so that {', '.join(sorted(won))} can serve it, too"
    return config, keys


def _servers(config: SpeculatorModelConfig, facts: VerifierFacts) -> set[str]:
    return {each.server for each in servers_reading(config, facts, k=1) if not each.reasons}


def _write(target: Path, text: str, facts: VerifierFacts, processes: int) -> None:
    """Writes the file, unless it exists or would not be valid."""
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError([Problem("", f"{target} exists already", "name another file with --out")]) from None
    except OSError as error:
        raise SpeculatorsError(f"{target} cannot be written: {error.strerror}") from None
    try:
        recipe = load_recipe(str(target.resolve()))
        if problems := [*check_recipe(recipe, world_size=processes), *check_verifier(recipe, facts)]:
            raise RecipeError(problems)
    except SpeculatorsError:
        # A recipe that cannot run is no start.
        target.unlink()
        raise


def _plan(path: str, options: argparse.Namespace) -> int:
    from . import verb_parser

    module, parser = verb_parser("plan")
    arguments = [path]
    for name in ("gpus", "verifier_config"):
        if value := getattr(options, name):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return int(module.run(parser.parse_args(arguments)))
