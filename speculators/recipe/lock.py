"""The lock of a run: all that determines its result, as a frozen value that is read from and written to lock.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import LockError, Problem, RecipeError
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.document import migrate
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.schema import Recipe
from speculators.recipe.values import leaves
from speculators.structure.converter import structure
from speculators.structure.faults import Invalid
from speculators.structure.origin import path_text

FORMAT = 2
NAME = "lock.json"
# Stages that every run has.
_ALWAYS = ("verifier", "prepare", "train")


@attrs.frozen(kw_only=True)
class Code:
    """Which code of this package computed.

    Attributes:
        commit: of git, None where it was not run from a checkout.
        dirty: the checkout had changes that were not committed.
        wheel: sha256 of the wheel that was installed, where pip knows it.
        sources: sha256 of all modules that compute; this is what decides, the others are for people.
    """

    version: str
    commit: str | None = None
    dirty: bool | None = None
    wheel: str | None = None
    sources: str


@attrs.frozen(kw_only=True)
class Environment:
    """Where a run ran.

    Attributes:
        packages: versions of those that compute.
        device: "cpu" or "cuda".
        device_name: the processor, and the GPU where there is one.
        cpu_capability: the instructions that torch's own kernels use.
        bf16_products: the device multiplies bf16; otherwise what asks for it computes in float32.
        variables: environment variables that choose kernels, those that are set.
    """

    packages: dict[str, str]
    code: Code
    python: str
    system: str
    machine: str
    device: str
    device_name: str
    cpu_capability: str
    bf16_products: bool
    threads: int
    world_size: int
    variables: dict[str, str]


@attrs.frozen(kw_only=True)
class VerifierLock:
    """The verifier's content.

    Attributes:
        files: sha256 of each file that is read: weights, tokenizer, configs.
        chat_template: sha256 of the template's text; None if it has none.
        config: its config.json, so that the plan can be made again without the model.
    """

    files: dict[str, str]
    chat_template: str | None = None
    config: dict[str, Any]


@attrs.frozen(kw_only=True)
class Lock:
    """All that determines a run's result.

    Attributes:
        recipe: resolved, as tables.
        fingerprints: of each stage.
        inputs: of each stage: what its fingerprint is the hash of, those of data and suites among them.
        dtypes: of the verifier, of the states and of training.
        environment: the run began in.
        resumed_in: the others that worked on it, in order.
    """

    format: int = FORMAT
    recipe: dict[str, Any]
    verifier: VerifierLock
    fingerprints: dict[str, str]
    inputs: dict[str, dict[str, Any]]
    seed: int
    dtypes: dict[str, str]
    environment: Environment
    resumed_in: tuple[Environment, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Lock:
        """Reads the lock of a run folder.

        Raises:
            LockError: it is missing, damaged, or of a format that this version does not read.
        """
        file = folder / NAME
        held = _document(folder, file)
        lock, problems = structure(held, cls, file=str(file))
        if lock is None:
            told = "\n".join(map(str, problems))
            raise LockError(f"{file}: damaged:\n{told}", hint="spec run of its recipe writes it again")
        if wrong := [name for name in {*_ALWAYS, *lock.fingerprints, *lock.inputs} if not lock._holds(name)]:
            told = f"{', '.join(sorted(wrong))}: the fingerprint is not that of the inputs"
            raise LockError(f"{file}: damaged: {told}", hint="spec run of its recipe writes it again")
        return lock

    def _holds(self, stage: str) -> bool:
        known = stage in self.inputs and stage in self.fingerprints
        return known and fingerprint(self.inputs[stage]) == self.fingerprints[stage]

    def to_json(self) -> dict[str, Any]:
        """Returns the lock as JSON values."""
        return attrs.asdict(self)

    def resolved(self, folder: Path) -> Recipe:
        """Returns the recipe as it was, whatever became of its file since; imports its plug-in.

        Args:
            folder: of the run, beside which a plug-in is looked for, too.

        Raises:
            LockError: this version cannot read it, or the plug-in is missing.
        """
        file = folder / NAME
        try:
            recipe, problems = self._structured(folder)
            told = [str(problem) for problem in problems]
        except Invalid as invalid:
            recipe, told = None, [fault.message for fault in invalid.faults]
        except RecipeError as error:
            recipe, told = None, [str(problem) for problem in error.problems]
        except (KeyError, TypeError, AttributeError) as error:
            recipe, told = None, [f"recipe: damaged: {error!r}"]
        if recipe is None:
            hint = "use the version that made the run: environment.code in the lock names it"
            raise LockError(f"{file}: its recipe cannot be used:\n" + "\n".join(told), hint=hint)
        return recipe

    def _structured(self, folder: Path) -> tuple[Recipe | None, list[Problem]]:
        file = str(folder / NAME)
        tables = migrate(self.recipe, file=file)
        # None is how tables say that there is no plug-in; a recipe says nothing.
        algorithm = {key: value for key, value in tables["algorithm"].items() if (key, value) != ("module", None)}
        if "module" in algorithm:
            import_plugin(algorithm["module"], folder)
        return structure({**tables, "algorithm": algorithm}, Recipe, path=("recipe",), file=file)


def _document(folder: Path, file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        lacks = "no run: there is no lock.json" if folder.is_dir() else "no such run folder"
        raise LockError(f"{folder}: {lacks}", hint="spec ls lists the runs") from None
    except (OSError, ValueError) as error:
        raise LockError(f"{file}: damaged: {error}", hint="spec run of its recipe writes it again") from None
    found = held.get("format") if isinstance(held, dict) else None
    if isinstance(found, bool) or not isinstance(found, int):
        raise LockError(f"{file}: damaged: it has no format", hint="spec run of its recipe writes it again")
    if found > FORMAT:
        hint = "use the version that made the run, or a newer one"
        raise LockError(f"{file}: format {found} is newer than this version, which reads {FORMAT}", hint=hint)
    if found < FORMAT:
        hint = "spec run of its recipe in another folder (--runs) makes a run that can be reproduced"
        raise LockError(f"{file}: format {found} says too little to run again: no recipe, no hashes", hint=hint)
    return dict(held)


@attrs.frozen(kw_only=True)
class Difference:
    """Something that two environments differ in.

    Attributes:
        key: its path in the lock.
        matters: it can change bits of the result.
        why: in words.
    """

    key: str
    locked: Any
    current: Any
    matters: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """JSON values under the keys that reproduction.json has had from the start."""
        values = attrs.asdict(self)
        values["here"] = values.pop("current")
        return values


# Why each kind of difference can change bits of the result. What is not here cannot, or is decided by code.sources.
_MATTERS = {
    "packages": "another version computes",
    "code.sources": "other code of this package computes",
    "system": "other libraries compute",
    "machine": "other instructions compute",
    "device": "other kernels compute",
    "device_name": "kernels and the parts in which they add up are chosen by it",
    "cpu_capability": "other kernels compute",
    "bf16_products": "bf16 and float32 round otherwise",
    "threads": "sums are added up in other parts",
    "world_size": "gradients are added up in other parts",
    "variables": "it chooses kernels",
}
_THIS = "packages.spec-recipes"


def differences(locked: Environment, here: Environment) -> list[Difference]:
    """Returns what two environments differ in, and whether it can matter."""
    one, other = (_flat(attrs.asdict(each)) for each in (locked, here))
    found = []
    for key in dict.fromkeys([*one, *other]):
        before, after = one.get(key), other.get(key)
        if before != after:
            matters, why = _weigh(key, before, after)
            found.append(Difference(key=key, locked=before, current=after, matters=matters, why=why))
    return found


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {path_text(path): value for path, value in leaves((), dict(values)) if value != {}}


def _weigh(key: str, before: Any, after: Any) -> tuple[bool, str]:
    if key == "python":
        minor = [str(version).split(".")[:2] for version in (before, after)]
        if minor[0] != minor[1]:
            return True, "another standard library computes"
        return False, "a patch release computes the same"
    if key == _THIS or (key.startswith("code.") and key != "code.sources"):
        return False, "code.sources tells whether code that computes differs"
    for kind, why in _MATTERS.items():
        if key == kind or key.startswith(f"{kind}."):
            return True, why
    raise AssertionError(f"{key} is not weighed")
