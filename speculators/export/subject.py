"""What is exported: a run's speculator or any other, its algorithm's plug-in, and its verifier where it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError, RecipeError, VerifierError
from speculators.events import Progress
from speculators.model import read_config
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.converter import structure
from speculators.recipe.faults import Invalid
from speculators.recipe.sources import VerifierSection
from speculators.verifier import hub
from speculators.verifier.sources import held_folder, obtain


@attrs.frozen(kw_only=True)
class Found:
    """A speculator that was found.

    Attributes:
        folder: of it.
        name: for people and new folders: the run's, or the folder's.
        verifier: the folder of its verifier, at least config and tokenizer; None where it is not on this machine.
    """

    folder: Path
    name: str
    verifier: Path | None


def find(place: Path, verifier: str | None, *, progress: Progress) -> Found:
    """Finds the speculator of a run or checkpoint folder, and its verifier without fetching weights.

    Args:
        place: a run folder, or a folder with a speculator.
        verifier: replaces the verifier of the run or of config.json; is obtained whole.

    Raises:
        ArtifactError: there is no speculator.
        VerifierError: the one that was given cannot be obtained.
    """
    folder = next((each for each in (place / "speculator", place) if (each / "config.json").is_file()), None)
    if folder is None:
        raise ArtifactError(f"{place}: neither a run with a speculator nor a speculator", hint="spec ls lists the runs")
    recipe = _recipe(folder)
    if recipe is not None and recipe["algorithm"]["module"] is not None:
        try:
            import_plugin(recipe["algorithm"]["module"], folder.parent)
        except Invalid as invalid:
            raise ArtifactError(f"{folder}: {'; '.join(fault.message for fault in invalid.faults)}") from invalid
    name = folder.absolute().parent.name if recipe is not None else folder.absolute().name
    if verifier is not None:
        return Found(folder=folder, name=name, verifier=obtain(_section({"model": _path(verifier)}), progress=progress))
    if recipe is not None:
        values = {key: value for key, value in recipe["verifier"].items() if value is not None}
    else:
        held = read_config(folder).speculators_config
        values = {"model": _path(held.verifier.name_or_path)} if held else {}
    return Found(folder=folder, name=name, verifier=_here(_section(values)) if values else None)


def _recipe(folder: Path) -> dict[str, Any] | None:
    """Returns the resolved recipe of the run that the speculator is in, None where it is in no run."""
    plan = folder.absolute().parent / "plan.json"
    if folder.absolute().name != "speculator" or not plan.is_file():
        return None
    try:
        return dict(json.loads(plan.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{plan}: damaged: {error!r}", hint="spec run of the recipe writes it again") from error


def _path(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _section(values: dict[str, Any]) -> VerifierSection:
    section, problems = structure(values, VerifierSection, path=("verifier",))
    if section is None:
        raise RecipeError(problems)
    return section


def _here(section: VerifierSection) -> Path | None:
    if section.kind == "hub":
        try:
            return hub.fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
        except VerifierError:  # told as not checked
            return None
    return held_folder(section)
