"""Names the local data files whose content differs from what a finished run read: they are why its data is remade."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from speculators.errors import DataError
from speculators.files.disk import read_json
from speculators.recipe.fingerprint import file_hashes, source_identity, suite_source
from speculators.recipe.input_sections import DataSource
from speculators.recipe.plan import read_plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import RunFolder, run_folders

# What decides which files a source or a suite names: its path (or a suite's name in the catalogue), and its split.
_Key = tuple[str, str | None]


def newest_finished(recipe: str, runs: Path) -> RunFolder | None:
    """Finds the run of a recipe of this name whose training ended last; None if there is none."""
    finished = [run for run in run_folders(runs) if run.trained.is_file() and _recipe_name(run) == recipe]
    return max(finished, key=lambda run: run.trained.stat().st_mtime_ns, default=None)


def _recipe_name(run: RunFolder) -> Any:
    plan = read_json(run.plan)
    table = plan.get("recipe") if isinstance(plan, dict) else None
    return table.get("name") if isinstance(table, dict) else None


def changed_files(recipe: Recipe, run: RunFolder, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Compares files with those that a run read: one line for each that differs, by the TOML path of its source.

    Args:
        recipe: as it is now; a source that the run did not have is left out.
        run: has a plan.
        keys: TOML paths; only files that one of these names are hashed.

    Raises:
        ArtifactError: the run's plan is damaged, or a file cannot be read.
    """
    then = dict(_planned(read_plan(run.plan)))
    changed = {}
    for path, key, source in _named(recipe):
        if path in keys and then.get(key):
            changed[path] = tuple(_differences(source, _hashes_now(source), then[key], run.name))
    return {path: lines for path, lines in changed.items() if lines}


def _planned(plan: Mapping[str, Any]) -> Iterator[tuple[_Key, Mapping[str, str]]]:
    """Yields the hashes that a plan computed for each local source and suite."""
    inputs = next(stage["inputs"] for stage in plan["stages"] if stage["name"] == "prepare")
    recipe = plan["recipe"]
    for tables, identities in (
        (recipe["data"]["sources"], inputs["sources"]),
        (recipe["benchmark"]["suites"], inputs["held_out"]),
    ):
        for table, identity in zip(tables, identities, strict=True):
            yield (table["path"] or table["name"], table["split"]), file_hashes(identity)


def _named(recipe: Recipe) -> Iterator[tuple[str, _Key, DataSource]]:
    """Yields each source and suite of a recipe by the TOML path of its files."""
    for index, source in enumerate(recipe.data.sources):
        yield f"data.sources[{index}].path", (source.path, source.split), source
    for index, suite in enumerate(recipe.benchmark.suites):
        yield f"benchmark.suites[{index}].path", (suite.path or suite.name, suite.split), suite_source(suite)


def _hashes_now(source: DataSource) -> Mapping[str, str]:
    try:
        return file_hashes(source_identity(source))
    except DataError:  # none of its files is there
        return {}


def _differences(source: DataSource, now: Mapping[str, str], then: Mapping[str, str], run: str) -> Iterator[str]:
    for name in sorted({*now, *then}):
        shown = name or Path(source.path).name
        if name not in now:
            yield f"{shown} is missing; {run} read it with sha256 {then[name][:8]}"
        elif name not in then:
            yield f"{shown} is new since {run}"
        elif now[name] != then[name]:
            yield f"{shown} has sha256 {now[name][:8]}; {run} read it with {then[name][:8]}"
