"""The file of an ablation: one base recipe, its variants as lists of `--set` options, and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
from attrs import field

from speculators.errors import Problem, RecipeError
from speculators.recipe.document import read_toml, shown_path
from speculators.recipe.expect import band_key
from speculators.registry import near_miss
from speculators.structure.converter import structure
from speculators.structure.origin import Origin, Part, key_lines, nearest_line
from speculators.structure.validators import each, matches, not_empty, seed

FORMAT = 1
BASE = "base"
# A variant's name is a row of tables, in Markdown, too.
NAME = r"[^|\n\r]*\S[^|\n\r]*"
# Are the same in all runs, or differ by seed alone; with what to do about each.
FIXED = {"seed": "list them in seeds"} | dict.fromkeys(("name", "version", "expect"), "leave it out")


@attrs.frozen(kw_only=True)
class AblationDocument:
    """The keys of the file.

    Attributes:
        format: of the file.
        recipe: of the base: a name in the catalogue, or a path from the file.
        seeds: with which every arm runs.
        set: options for the base and all variants.
        setting: decides, "SUITE/K=5/T=0"; None for the recipe's first suite, its largest K and its lowest T.
        variants: options by name, beyond those in `set`.
    """

    format: int = field()
    recipe: str = field(validator=not_empty)
    seeds: tuple[int, ...] = field(default=(0, 1, 2), validator=each(seed))
    set: tuple[str, ...] = ()
    setting: str | None = field(default=None, validator=matches(r".+/K=\d+/T=\d+(\.\d+)?", '"SUITE/K=5/T=0"'))
    variants: dict[str, tuple[str, ...]] = field(validator=not_empty)

    @format.validator
    def _known(self, attribute: attrs.Attribute[Any], value: int) -> None:
        if value != FORMAT:
            raise ValueError(f"must be {FORMAT}, the format that this version reads; got {value}")

    @variants.validator
    def _named(self, attribute: attrs.Attribute[Any], value: Mapping[str, tuple[str, ...]]) -> None:
        for name, options in value.items():
            if name == BASE or not re.fullmatch(NAME, name):
                raise ValueError(f'{name!r} cannot name a variant: use one line, without |, other than "{BASE}"')
            if not options:
                raise ValueError(f"{name!r} changes nothing: a variant is a list such as ['schedule.epochs=4']")


@attrs.frozen(kw_only=True)
class Ablation:
    """An ablation as its file describes it.

    Attributes:
        path: of the file.
        recipe: of the base: a name, or a path from the working folder.
        lines: line of each path of the file.
    """

    path: Path
    document: AblationDocument
    recipe: str
    lines: Mapping[tuple[Part, ...], int] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its folder beside the runs: that of the file."""
        return self.path.stem

    @property
    def setting(self) -> str | None:
        """The setting that decides, spelt as results spell it."""
        return None if self.document.setting is None else band_key(self.document.setting)

    def options(self, arm: str) -> tuple[str, ...]:
        """The `--set` options of the base or of a variant, the file's own first."""
        return self.document.set + self.document.variants.get(arm, ())

    def problem(self, parts: tuple[Part, ...], path: str, message: str, hint: str = "") -> Problem:
        """Reports a problem at the line of a key, or of the nearest key that contains it."""
        return Problem(path, message, hint, shown_path(self.path), nearest_line(self.lines, parts) or 1)


def load_ablation(name_or_path: str, seeds: Sequence[int] | None = None) -> Ablation:
    """Loads the file of an ablation: one that ships with the package, by name, or any other, by path.

    Args:
        seeds: instead of the file's; None for those.

    Raises:
        RecipeError: carries all problems of the file.
    """
    path = ablation_path(name_or_path)
    data, text = read_toml(path)
    if seeds is not None:
        data = {**data, "seeds": list(seeds)}
    lines, name = key_lines(text), shown_path(path)

    def locate(parts: tuple[Part, ...]) -> Origin:
        return Origin("recipe", name, nearest_line(lines, parts) or 1)

    document, problems = structure(data, AblationDocument, locate=locate)
    if document is None:
        raise RecipeError(sorted(problems, key=lambda problem: problem.line or 0))
    recipe = document.recipe
    if "/" in recipe or recipe.endswith(".toml"):
        recipe = str((path.parent / Path(recipe).expanduser()).resolve())
    return Ablation(path=path, document=document, recipe=recipe, lines=lines)


def ablation_path(name_or_path: str) -> Path:
    """Finds the file of an ablation.

    Raises:
        RecipeError: there is none; names the near miss.
    """
    if "/" not in name_or_path and not name_or_path.endswith(".toml"):
        shipped = {Path(str(file)).stem: Path(str(file)) for file in sorted(_shipped().glob("*.toml"))}
        if name_or_path not in shipped:
            hint = near_miss(name_or_path, list(shipped)) or (
                f"available: {', '.join(shipped)}; name a file of your own as ./{name_or_path}.toml"
            )
            raise RecipeError([Problem("", f"no ablation {name_or_path!r}", hint)])
        return shipped[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        message = "is a folder, not a file" if path.is_dir() else "no such file"
        hint = "spec ablate --help has an example; benchmarks/README.md describes the file"
        raise RecipeError([Problem("", message, hint, str(path))])
    return path


def _shipped() -> Path:
    return Path(str(resources.files("speculators.benchmarks"))) / "ablations"
