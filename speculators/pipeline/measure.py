"""Measuring a speculator that is on disk, with the verifier of its run or the one that its config names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.run import bench
from speculators.decoding.draft_model import pinned
from speculators.errors import ArtifactError, Problem, RecipeError
from speculators.events import Progress
from speculators.model import SpeculatorModel, read_config
from speculators.nn.precision import place
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.checks import too_many_drafts
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.schema import BenchmarkSection
from speculators.structure.converter import structure
from speculators.structure.faults import Invalid
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain


@attrs.frozen(kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        folder: holds config.json and model.safetensors.
        recipe: `recipe` of the run's plan.json; None where the speculator is not in a run.
        verifier: replaces the model of the recipe, or the one that config.json names; `@REVISION` may follow a hub id,
            `@SHA256` a GGUF file or a wheel's.
    """

    folder: Path
    recipe: dict[str, Any] | None
    verifier: str | None = None
    decoding: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def run(self) -> Path | None:
        """The run folder that the speculator is in."""
        return None if self.recipe is None else self.folder.absolute().parent

    @property
    def name(self) -> str:
        """What results call it."""
        return str(self.folder) if self.run is None else self.run.name


def measure_folder(subject: Subject, section: BenchmarkSection, *, progress: Progress) -> dict[str, Any]:
    """Returns the benchmark as JSON values.

    Raises:
        SpeculatorsError: speculator or verifier cannot be loaded, the algorithm lacks a hook, or drafts fewer tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if subject.recipe is not None:
        import_algorithm(subject.recipe["algorithm"], subject.folder.parent)
    config = decoding_otherwise(read_config(subject.folder), subject.decoding)
    if wrong := too_many_drafts(config, section.num_speculative_tokens):
        raise RecipeError([Problem("benchmark.num_speculative_tokens", wrong, "--k says which are measured")])
    verifier = verifier_of(subject)
    folder = obtain(verifier, progress=progress)
    model = place(SpeculatorModel.from_pretrained(subject.folder, verifier=folder), device)
    model.config = config
    told = subject.recipe is not None and subject.verifier is None
    engine = Engine(
        folder,
        dtype=verifier.dtype if told else str(next(model.parameters()).dtype).removeprefix("torch."),
        device=device,
        trust_remote_code=verifier.trust_remote_code,
    )
    return bench(model, engine, section, name=str(subject.folder), progress=progress).to_json()


def decoding_otherwise(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a config with other values of what only decoding reads; raises RecipeError for any other field."""
    known = list(type(config).decoding)
    problems = [
        Problem(f"algorithm.{name}", f"is not read by decoding alone ({', '.join(known) or 'nothing'} is)")
        for name in changes
        if name not in known
    ]
    if problems:
        raise RecipeError(problems)
    try:
        return attrs.evolve(config, **changes)
    except (ValueError, TypeError) as error:
        raise RecipeError([Problem(f"algorithm.{', '.join(changes)}", str(error))]) from None


def import_algorithm(table: dict[str, Any], folder: Path) -> None:
    """Imports the plug-in that `[algorithm]` of a run's recipe names, if it does; raises ArtifactError if it cannot."""
    if table["module"] is not None:
        try:
            import_plugin(table["module"], folder)
        except Invalid as invalid:
            raise ArtifactError(f"{folder}: {'; '.join(fault.message for fault in invalid.faults)}") from invalid


def verifier_of(subject: Subject) -> VerifierSection:
    """Returns which verifier a speculator is measured with; raises ArtifactError or RecipeError where none is named."""
    if subject.recipe is not None and subject.verifier is None:
        values = {key: value for key, value in subject.recipe["verifier"].items() if value is not None}
    else:
        name = subject.verifier or _named(subject.folder)
        if name is None:
            raise ArtifactError(f"{subject.folder}/config.json names no verifier", hint="--verifier MODEL does")
        if not Path(name).is_dir():
            return pinned(name, "verifier")
        values = {"model": str(Path(name).resolve())}
    section, problems = structure(values, VerifierSection, path=("verifier",))
    if section is None:
        raise RecipeError(problems)
    return section


def _named(folder: Path) -> str | None:
    held = read_config(folder).speculators_config
    return held.verifier.name_or_path if held else None
