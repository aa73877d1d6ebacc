"""Loads a recipe from its TOML file, or reports every problem of the file at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.config import CONFIGS
from speculators.errors import Problem, RecipeError
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.catalog import recipe_path, recipes_folder
from speculators.recipe.document import (
    Layer,
    holds,
    layers_over,
    locate,
    merge,
    read_layers,
    tables_layer,
    text_layer,
    with_present_keys,
)
from speculators.recipe.input_sections import DataSource, is_data_path
from speculators.recipe.schema import Recipe
from speculators.recipe.values import PLACES, as_tables, known_paths, leaves
from speculators.structure.converter import structure, to_problem
from speculators.structure.faults import Invalid
from speculators.structure.origin import Origin, path_text


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, folder: Path | None = None) -> Recipe:
    """Loads a recipe with the origin of every value; file paths in it become absolute.

    Args:
        name_or_path: a name in the catalogue, or a file.
        overrides: texts `section.key=value`, with the value in TOML.
        folder: where relative paths in the overrides start; None for the working folder.

    Raises:
        RecipeError: carries all problems.
    """
    path = recipe_path(name_or_path)
    return _loaded(read_layers(path, overrides, folder), path)


def load_tables(tables: Mapping[str, Any], file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe from the tables of a loaded one, as `as_tables` gives them; raises as `load_recipe` does.

    Args:
        file: the JSON file that keeps the tables.
    """
    return _loaded(layers_over(tables_layer(tables, file), overrides), file)


def reads_as(text: str, path: Path, recipe: Recipe) -> bool:
    """Whether a file of this text at this path would load as this very recipe."""
    try:
        return _loaded(layers_over(text_layer(text, path), ()), path) == recipe
    except RecipeError:
        return False


def _loaded(written: Sequence[Layer], path: Path) -> Recipe:
    layers = [attrs.evolve(layer, data=with_present_keys(layer.data)) for layer in written]
    data = merge(*(layer.data for layer in layers))
    problems = _import_module(data, layers)
    keys = [field.name for field in attrs.fields(Recipe) if field.name not in PLACES]
    recipe, faults = structure(data, Recipe, locate=lambda where: locate(layers, where), keys=keys)
    # Without its plug-in an algorithm is unknown: that is one fault, so it is reported once.
    problems += [p for p in faults if not (problems and p.path == "algorithm.name")]
    if problems or recipe is None:
        problems.sort(key=lambda problem: (problem.file or "", problem.line or 0))
        raise RecipeError([_point_elsewhere(problem, data) for problem in problems])
    notes = [
        f"{layer.file or '--set'}: data.server.endpoint is read as data.server.endpoints, a list of one server"
        for layer, before in zip(layers, written, strict=True)
        if layer.data != before.data
    ]
    return _anchored(attrs.evolve(recipe, file=path, notes=tuple(notes)), layers)


def _import_module(data: Mapping[str, Any], layers: Sequence[Layer]) -> list[Problem]:
    """Imports `algorithm.module` first, because the algorithm that it registers decides which keys are allowed."""
    table = data.get("algorithm")
    module = table.get("module") if isinstance(table, Mapping) else None
    if isinstance(module, str):
        written = next(layer for layer in reversed(layers) if holds(layer.data, ("algorithm", "module")))
        try:
            import_plugin(module, written.folder)
        except Invalid as invalid:
            return [to_problem(f, ("algorithm",), lambda where: locate(layers, where)) for f in invalid.faults]
    return []


def _point_elsewhere(problem: Problem, data: Mapping[str, Any]) -> Problem:
    """Adds a hint to an unknown key without a near miss: the section in which a key of that name exists."""
    if not problem.message.startswith("unknown key") or problem.hint.startswith("did you mean"):
        return problem
    table = data.get("algorithm")
    name = table.get("name") if isinstance(table, Mapping) else None
    config_class = CONFIGS.get(name) if name in CONFIGS.names() else None
    key = problem.path.rpartition(".")[2]
    places = [path for path in known_paths(config_class) if path.rpartition(".")[2] == key]
    hint = f"did you mean {' or '.join(repr(path) for path in places)}?"
    return dataclasses.replace(problem, hint=hint) if places else problem


def _anchored(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """Adds the origins, and makes file paths absolute: a relative path starts from the folder of the file it is in."""
    written = {
        path_text(path): locate(layers, path) if any(holds(layer.data, path) for layer in layers) else Origin("default")
        for path, _ in leaves((), as_tables(recipe))
    }
    folders = {layer.file: layer.folder for layer in layers}

    def absolute(file: str, path: str) -> str:
        beside = folders[written[path].file] / _expanded(file, path, written[path])
        # A copy of a shipped recipe still finds the data that ships with it.
        shipped = recipes_folder() / file
        return str((beside if _exists(beside) or not _exists(shipped) else shipped).resolve())

    sources, suites, verifier = list(recipe.data.sources), list(recipe.benchmark.suites), recipe.verifier
    notes = list(recipe.notes)
    server = recipe.data.server
    if server.folder is not None:
        server = attrs.evolve(server, folder=absolute(server.folder, "data.server.folder"))
    for index, source in enumerate(sources):
        place = f"data.sources[{index}].path"
        beside = folders[written[place].file] / source.path
        if source.is_local or _names_folder(source, beside):
            sources[index] = attrs.evolve(source, path=absolute(source.path, place))
        if not source.is_local and _names_folder(source, beside):
            notes.append(
                f'{place} = "{source.path}" is read as the folder {beside}, not as the hub id of a data set: '
                f"write ./{source.path} for the folder, or set revision for the data set"
            )
    for index, suite in enumerate(suites):
        if suite.path is not None and is_data_path(suite.path):
            suites[index] = attrs.evolve(suite, path=absolute(suite.path, f"benchmark.suites[{index}].path"))
    if verifier.kind in ("gguf", "folder"):
        verifier = attrs.evolve(verifier, model=absolute(verifier.model, "verifier.model"))
    if verifier.chat_template is not None:
        file = absolute(verifier.chat_template, "verifier.chat_template")
        verifier = attrs.evolve(verifier, chat_template=file)
    algorithm = recipe.algorithm
    if (start := algorithm.config.init_from) is not None:
        config = attrs.evolve(algorithm.config, init_from=absolute(start, "algorithm.init_from"))
        algorithm = attrs.evolve(algorithm, config=config)
    return attrs.evolve(
        recipe,
        verifier=verifier,
        algorithm=algorithm,
        data=attrs.evolve(recipe.data, sources=tuple(sources), server=server),
        benchmark=attrs.evolve(recipe.benchmark, suites=tuple(suites)),
        origins=written,
        notes=tuple(notes),
    )


def _names_folder(source: DataSource, beside: Path) -> bool:
    """Whether a path that could be a hub id names what lies beside the recipe; with a revision it is a hub id."""
    return not source.is_local and source.revision is None and _exists(beside)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _expanded(file: str, path: str, origin: Origin) -> Path:
    try:
        return Path(file).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise RecipeError([Problem(path, f"{file}: {error}", file=origin.file, line=origin.line)]) from None
