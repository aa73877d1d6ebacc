"""The locks of the recipes that come with the package, and whether what a lock names can still be resolved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError, LockError, RecipeError
from speculators.facts import VerifierFacts
from speculators.files.disk import file_sha256
from speculators.recipe.catalog import recipes_folder, resolved_suite, suites_folder
from speculators.recipe.checks import check_recipe
from speculators.recipe.fingerprint import verifier_identity
from speculators.recipe.input_sections import VerifierSection, is_file_path
from speculators.recipe.load import load_recipe
from speculators.recipe.lock import Lock
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe

FORMAT = 1
NAME = "locks.json"


@attrs.frozen(kw_only=True)
class LockCheck:
    """What checking one lock showed.

    Attributes:
        name: of the recipe, or the run folder.
        problems: why it does not resolve; none if it does.
        notes: what could not be checked, or is not pinned.
    """

    name: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_locks() -> dict[str, Any]:
    """Returns the locks that come with the package: config.json of each verifier, inputs of each recipe's stages."""
    file = recipes_folder() / NAME
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise LockError(f"{file}: format {held['format']}, this version reads {FORMAT}")
        return {"format": FORMAT, "verifiers": dict(held["verifiers"]), "recipes": dict(held["recipes"])}
    except FileNotFoundError:
        return {"format": FORMAT, "verifiers": {}, "recipes": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LockError(f"{file}: damaged: {error!r}", hint="git checkout restores it") from error


def shipped_facts(section: VerifierSection) -> VerifierFacts | None:
    """Returns the config.json that the locks of the recipes have of a verifier; None of another one or revision."""
    held = read_locks()
    if section.model not in held["verifiers"]:
        return None
    same = any(_is_of(section, lock["inputs"]["verifier"]) for lock in held["recipes"].values())
    return VerifierFacts(held["verifiers"][section.model], f"{NAME}: {section.model}") if same else None


def facts_of_run(folder: Path, section: VerifierSection) -> VerifierFacts | None:
    """Returns the config.json that a run's lock has of this verifier; None of another, or without a lock to read."""
    try:
        lock = Lock.read(folder)
    except LockError:
        return None
    same = _is_of(section, lock.inputs["verifier"])
    return VerifierFacts(lock.verifier.config, str(folder / "lock.json")) if same else None


def _is_of(section: VerifierSection, inputs: Mapping[str, Any]) -> bool:
    """Returns whether a stage `verifier` has these inputs for this verifier, where its name and hash tell that."""
    if section.kind == "folder" or (section.kind == "gguf" and section.sha256 is None):
        return False
    identity = verifier_identity(section)
    return all(inputs.get(key) == value for key, value in identity.items() if key != "trust_remote_code")


# What of two config.json shows that they are of different models, however old the file is.
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def contradictions(facts: VerifierFacts, known: VerifierFacts) -> list[str]:
    """Returns what a given config.json says otherwise than the one that is known of the verifier, in words."""
    shared = [key for key in _ARCHITECTURE if key in facts and key in known and facts[key] != known[key]]
    return [f"{key} {facts[key]}, not {known[key]}" for key in shared]


def write_locks(held: Mapping[str, Any]) -> Path:
    """Writes the locks of the recipes into their folder, which is that of a checkout."""
    file = recipes_folder() / NAME
    told = {key: held[key] if key == "format" else dict(sorted(held[key].items())) for key in held}
    try:
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written: {error.strerror}") from error
    return file


def lock_of_recipe(name: str, facts: VerifierFacts) -> dict[str, Any]:
    """Returns the lock of a recipe of the catalogue."""
    plan = make_plan(load_recipe(name), facts)
    return {"version": plan.recipe.version, "fingerprints": plan.fingerprints(), "inputs": plan.inputs()}


def check_shipped(name: str, held: Mapping[str, Any]) -> LockCheck:
    """Returns whether a recipe of the catalogue still is what its lock says, offline."""
    recipe = load_recipe(name)
    mend = f"spec lock --write {name}"
    if name not in held["recipes"]:
        return LockCheck(name=name, problems=(f"has no lock ({mend} makes it)",))
    if recipe.verifier.model not in held["verifiers"]:
        return LockCheck(name=name, problems=(f"the lock has no config.json of {recipe.verifier.model} ({mend})",))
    lock, facts = held["recipes"][name], VerifierFacts(held["verifiers"][recipe.verifier.model])
    problems = _compared(recipe, facts, lock["inputs"], lock["fingerprints"])
    if problems and recipe.version == lock["version"]:
        problems += (f"its meaning changed and its version {recipe.version} did not: raise it, then {mend}",)
    return LockCheck(name=name, problems=problems, notes=_unpinned(recipe))


def check_run(folder: Path) -> LockCheck:
    """Returns whether what a run's lock names can still be resolved; the verifier's files are left to the caller."""
    lock = Lock.read(folder)
    recipe, lost = relocate(lock.resolved(folder), lock, folder)
    if lost:
        return LockCheck(name=str(folder), problems=tuple(str(each) for each in lost))
    facts = VerifierFacts(lock.verifier.config)
    problems = _compared(recipe, facts, lock.inputs, lock.fingerprints)
    return LockCheck(name=str(folder), problems=problems, notes=_unpinned(recipe))


def _compared(
    recipe: Recipe, facts: VerifierFacts, inputs: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> tuple[str, ...]:
    if problems := check_recipe(recipe):
        return tuple(str(problem) for problem in problems)
    try:
        plan = make_plan(recipe, facts)
    except RecipeError as error:
        return tuple(str(problem) for problem in error.problems)
    here, found = plan.inputs(), plan.fingerprints()
    told = [
        f"{stage}: {path} is {before!r} in the lock, and {after!r} here"
        for stage in dict.fromkeys([*inputs, *here])
        for path, before, after in differing_inputs(inputs, here, stage)
    ]
    if not told and dict(fingerprints) != found:
        told = ["the inputs are the same and the fingerprints are not: the lock was edited"]
    return tuple(told)


def _unpinned(recipe: Recipe) -> tuple[str, ...]:
    """Returns what a hub may replace by something else under the same name."""
    named = [("verifier", recipe.verifier.model, recipe.verifier.revision)] if recipe.verifier.kind == "hub" else []
    named += [("data", source.path, source.revision) for source in recipe.data.sources if not source.is_file]
    return tuple(f"{kind} {name} has no revision: what it is may change" for kind, name, rev in named if rev is None)


Stages = Mapping[str, Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class MissingFile:
    """A file that is nowhere with the content that the lock has.

    Attributes:
        stage: that reads it.
        key: its path in the recipe.
        locked: sha256.
        current: sha256 of what is there under its name now; None where there is nothing.
    """

    stage: str
    key: str
    file: str
    locked: str
    current: str | None

    def __str__(self) -> str:
        there = "it is not there" if self.current is None else f"its sha256 is {self.current}"
        return f"{self.key} = {self.file}: {there}, that of the lock is {self.locked}"


def relocate(recipe: Recipe, lock: Lock, run: Path) -> tuple[Recipe, list[MissingFile]]:
    """Returns the recipe with each file where its content is, and the files whose content is nowhere."""
    folders = (run, run.parent, Path.cwd(), recipes_folder() / "data", recipes_folder(), suites_folder())
    lost: list[MissingFile] = []

    def find(stage: str, key: str, path: str, identity: Mapping[str, Any]) -> str:
        digest = identity.get("sha256")
        if digest is None or not is_file_path(path):
            return path  # of a hub: its revision is what identifies it
        places = [Path(path), *(folder / Path(path).name for folder in folders)]
        digests = {place: file_sha256(place) for place in places if place.is_file()}
        for place, found in digests.items():
            if found == digest:
                return str(place.resolve())
        there = next(iter(digests.values()), None)
        lost.append(MissingFile(stage=stage, key=key, file=path, locked=digest, current=there))
        return path

    inputs = lock.inputs["prepare"]
    sources = tuple(
        attrs.evolve(source, path=find("prepare", f"data.sources[{index}].path", source.path, identity))
        for index, (source, identity) in enumerate(_pairs(recipe.data.sources, inputs["sources"]))
    )
    suites = []
    for index, (suite, identity) in enumerate(_pairs(recipe.benchmark.suites, inputs["held_out"])):
        whole = resolved_suite(suite)
        path = find("prepare", f"benchmark.suites[{index}].path", str(whole.path), identity)
        # A suite of the catalogue keeps its name alone while the catalogue has its content.
        suites.append(suite if path == str(whole.path) else attrs.evolve(whole, path=path))
    return (
        attrs.evolve(
            recipe,
            data=attrs.evolve(recipe.data, sources=sources),
            benchmark=attrs.evolve(recipe.benchmark, suites=tuple(suites)),
        ),
        lost,
    )


def _pairs(values: Sequence[Any], identities: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any]]]:
    """Returns each value with its identity; one that a changed recipe has more of has none."""
    return [(value, identities[index] if index < len(identities) else {}) for index, value in enumerate(values)]


def differing_inputs(locked: Stages, here: Stages, stage: str) -> list[tuple[str, Any, Any]]:
    """Returns (path, of the lock, here) of what differs in a stage's own inputs; those of earlier stages are theirs.

    Args:
        locked, here: inputs of each stage, as JSON values.
    """
    if stage not in locked or stage not in here:
        before, after = ("there" if stage in side else None for side in (locked, here))
        return [(f"the stage {stage}", before, after)]
    one, other = ({key: value for key, value in side[stage].items() if key not in side} for side in (locked, here))
    return list(_differences("", one, other))


def _differences(path: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _differences(f"{path}.{key}" if path else key, one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{index}]", *pair)
    elif one != other:
        yield path, one, other
