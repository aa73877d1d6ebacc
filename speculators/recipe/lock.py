"""The lock of a run: everything that determines its result, as a frozen value read from and written to lock.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import LockError, Problem, RecipeError
from speculators.recipe.algorithm import import_plugin
from speculators.recipe.document import migrate, with_present_keys
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.schema import Recipe
from speculators.recipe.values import leaves
from speculators.structure.converter import structure
from speculators.structure.faults import Invalid
from speculators.structure.origin import path_text

FORMAT = 2
NAME = "lock.json"
_WRITE_AGAIN = "run its recipe again with spec run to write it anew"
# The stages that every run has.
_ALWAYS = ("verifier", "prepare", "train")


@attrs.frozen(kw_only=True)
class Code:
    """The version of this package that ran.

    Attributes:
        commit: git commit; None for an installed package.
        dirty: whether the checkout had uncommitted changes.
        wheel: sha256 of the installed wheel, if pip recorded it.
        sources: sha256 of all modules that compute. This one decides; the others are for people.
    """

    version: str
    commit: str | None = None
    dirty: bool | None = None
    wheel: str | None = None
    sources: str


@attrs.frozen(kw_only=True)
class Environment:
    """The machine and software that a run used.

    Attributes:
        packages: versions of the packages that compute.
        device: "cpu" or "cuda".
        device_name: the processor, and the GPU if one was used.
        cpu_capability: instruction set that torch's own kernels use.
        bf16_products: whether the device multiplies bf16; otherwise float32 takes its place.
        variables: environment variables that select kernels, if they are set.
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
        files: sha256 of each file that a run reads: weights, tokenizer, configs.
        chat_template: sha256 of the template's text; None without a template.
        config: the verifier's config.json, so that the plan can be made again without the model.
    """

    files: dict[str, str]
    chat_template: str | None = None
    config: dict[str, Any]


@attrs.frozen(kw_only=True)
class Lock:
    """Everything that determines a run's result.

    Attributes:
        recipe: the resolved recipe, as tables.
        fingerprints: fingerprint of each stage.
        inputs: inputs of each stage, which its fingerprint hashes; they include the hashes of data and suites.
        dtypes: precision of the verifier, of the states and of training.
        environment: where the run began.
        resumed_in: other environments that continued the run, in order.
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
            LockError: the lock is missing, damaged, or in a format that this version cannot read.
        """
        file = folder / NAME
        lock, problems = structure(_document(folder, file), cls, file=str(file))
        if lock is None:
            lines = "\n".join(map(str, problems))
            raise LockError(f"{file}: damaged:\n{lines}", hint=_WRITE_AGAIN)
        if wrong := [name for name in {*_ALWAYS, *lock.fingerprints, *lock.inputs} if not lock._is_intact(name)]:
            stages = ", ".join(sorted(wrong))
            raise LockError(f"{file}: damaged: {stages}: the fingerprint does not match the inputs", hint=_WRITE_AGAIN)
        return lock

    def _is_intact(self, stage: str) -> bool:
        known = stage in self.inputs and stage in self.fingerprints
        return known and fingerprint(self.inputs[stage]) == self.fingerprints[stage]

    def to_json(self) -> dict[str, Any]:
        """Converts the lock to JSON values."""
        return attrs.asdict(self)

    def resolved(self, folder: Path) -> Recipe:
        """Restores the recipe as it was, even if its file has changed since; imports its plug-in.

        Args:
            folder: the run folder, which is also searched for a plug-in.

        Raises:
            LockError: this version cannot read the recipe, or the plug-in is missing.
        """
        file = folder / NAME
        try:
            recipe, problems = self._structured(folder)
            messages = [str(problem) for problem in problems]
        except Invalid as invalid:
            recipe, messages = None, [fault.message for fault in invalid.faults]
        except RecipeError as error:
            recipe, messages = None, [str(problem) for problem in error.problems]
        except (KeyError, TypeError, AttributeError) as error:
            recipe, messages = None, [f"recipe: damaged: {error!r}"]
        if recipe is None:
            hint = "use the version that made the run, which environment.code in the lock names"
            raise LockError(f"{file}: its recipe cannot be used:\n" + "\n".join(messages), hint=hint)
        return recipe

    def _structured(self, folder: Path) -> tuple[Recipe | None, list[Problem]]:
        file = str(folder / NAME)
        tables = with_present_keys(migrate(self.recipe, file=file))
        # Tables write None for "no plug-in", where a recipe has no key.
        algorithm = {key: value for key, value in tables["algorithm"].items() if (key, value) != ("module", None)}
        if "module" in algorithm:
            import_plugin(algorithm["module"], folder)
        return structure({**tables, "algorithm": algorithm}, Recipe, path=("recipe",), file=file)


def _document(folder: Path, file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        message = "not a run, it has no lock.json" if folder.is_dir() else "no such run folder"
        raise LockError(f"{folder}: {message}", hint="spec ls lists the runs") from None
    except (OSError, ValueError) as error:
        raise LockError(f"{file}: damaged: {error}", hint=_WRITE_AGAIN) from None
    written = document.get("format") if isinstance(document, dict) else None
    if isinstance(written, bool) or not isinstance(written, int):
        raise LockError(f"{file}: damaged: it has no format", hint=_WRITE_AGAIN)
    if written > FORMAT:
        hint = "use the version that made the run, or a newer one"
        raise LockError(f"{file}: format {written} is newer than this version, which reads {FORMAT}", hint=hint)
    if written < FORMAT:
        hint = "run its recipe in another folder (spec run RECIPE --runs FOLDER) for a run that can be reproduced"
        raise LockError(f"{file}: format {written} lacks the recipe and the hashes needed to run it again", hint=hint)
    return dict(document)


@attrs.frozen(kw_only=True)
class Difference:
    """One value that differs between the environment in a lock and the current one.

    Attributes:
        key: path of the value in the lock.
        matters: whether it can change bits of the result.
        why: the reason, in words.
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


# Why each kind of difference can change bits of the result. Others cannot, or code.sources decides for them.
_MATTERS = {
    "packages": "a different version runs",
    "code.sources": "different code of this package runs",
    "system": "different system libraries run",
    "machine": "different instructions run",
    "device": "different kernels run",
    "device_name": "it decides which kernels run and how they split their sums",
    "cpu_capability": "different kernels run",
    "bf16_products": "bf16 and float32 round differently",
    "threads": "sums are split differently",
    "world_size": "gradients are summed in different parts",
    "variables": "it selects kernels",
}
_THIS = "packages.spec-recipes"


def differences(locked: Environment, current: Environment) -> list[Difference]:
    """Compares two environments, and says for each difference whether it can matter."""
    one, other = (_flat(attrs.asdict(each)) for each in (locked, current))
    differing = []
    for key in dict.fromkeys([*one, *other]):
        before, after = one.get(key), other.get(key)
        if before != after:
            matters, why = _weigh(key, before, after)
            differing.append(Difference(key=key, locked=before, current=after, matters=matters, why=why))
    return differing


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {path_text(path): value for path, value in leaves((), dict(values)) if value != {}}


def _weigh(key: str, before: Any, after: Any) -> tuple[bool, str]:
    if key == "python":
        minor = [str(version).split(".")[:2] for version in (before, after)]
        if minor[0] != minor[1]:
            return True, "a different standard library runs"
        return False, "a patch release gives the same results"
    if key == _THIS or (key.startswith("code.") and key != "code.sources"):
        return False, "code.sources shows whether the code that computes differs"
    for kind, why in _MATTERS.items():
        if key == kind or key.startswith(f"{kind}."):
            return True, why
    raise AssertionError(f"{key} is not weighed")
