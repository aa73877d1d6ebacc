"""What the stages of a run and of its re-run made: conversations, states, training, benchmark, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.data.encoded import Conversations
from speculators.data.store import LAST, STATES, StateStore
from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.recipe.lock import Lock
from speculators.recipe.plan import Plan
from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN, Finding, Gap, finding, gap, unknown
from speculators.reproduce.logs import compare_logs
from speculators.reproduce.tensors import compare_checkpoints, compare_speculators, tensor_gap
from speculators.runs.places import Places
from speculators.runs.stages import SPECULATOR, TRAINED, made


@attrs.frozen(kw_only=True)
class Sides:
    """A run and its re-run.

    Attributes:
        run: the folder of the run.
        lock: of the run.
        cache: where the run may have left conversations and states.
        plan, places: of the re-run.
        tolerance: None where the bits must be the same.
    """

    run: Path
    lock: Lock
    cache: Path
    plan: Plan
    places: Places
    tolerance: float | None

    @property
    def again(self) -> Path:
        """The folder of the re-run."""
        return self.places.run(self.plan)


def compare(stage: str, sides: Sides) -> list[Finding]:
    """Returns what the outputs of one stage show; the verifier is an input, and checked before."""
    return _COMPARES[stage](sides) if stage in _COMPARES else []


def _files(sides: Sides, stage: str, detail: Callable[[Sides], Gap | None]) -> list[Finding]:
    """Compares the hashes of a stage's files; `detail` finds what differs in them where the run's are still there."""
    recorded, again = (made(folder).get(stage) for folder in (sides.run, sides.again))
    if recorded is None or again is None:
        return [unknown(stage, "files", f"the {'run' if recorded is None else 're-run'} kept no hashes of it")]
    differ = [
        name
        for name in dict.fromkeys([*recorded["files"], *again["files"]])
        if recorded["files"].get(name) != again["files"].get(name)
    ]
    if not differ:
        return [finding(stage, "files", [], same=f"{len(again['files'])} by sha256")]
    found = detail(sides)
    if found is not None:
        told = finding(stage, "files", [found], same="")
        return [attrs.evolve(told, evidence=f"{', '.join(differ)}: {told.evidence}")]
    words = f"{', '.join(differ)}: the sha256 differs; what was there is not in {sides.cache} any more"
    one, other = (side["files"].get(differ[0]) for side in (recorded, again))
    # States are numbers, and another platform's may be off by a rounding that a hash cannot tell from another text.
    result = UNKNOWN if stage == "capture" and sides.tolerance is not None else DIFFERS
    return [
        Finding(stage=stage, check="files", result=result, evidence=words, what=differ[0], recorded=one, again=other)
    ]


def _first_token(sides: Sides) -> Gap | None:
    """Returns the first conversation that differs, and where, if the run's own are still in the cache."""
    key = sides.lock.fingerprints["prepare"]
    try:
        ours = Conversations.open(sides.cache / "conversations" / key[:16], key=key, verify=True)
        theirs = Conversations.open(sides.places.prepared(sides.plan))
    except ArtifactError:
        return None
    if made(sides.run)["prepare"]["files"] != {name: held["sha256"] for name, held in ours.manifest["files"].items()}:
        return None
    for index, (one, other) in enumerate(zip(ours.ids(), theirs.ids(), strict=False)):
        if one != other:
            return Gap(what=f"conversation {index}", recorded=one, again=other, by=None, within=False)
        rows = ours.row(index), theirs.row(index)
        for name in ("input_ids", "loss_mask"):
            pair = [getattr(row, name) for row in rows]
            if len(pair[0]) != len(pair[1]):
                what = f"conversation {one}, tokens"
                return Gap(what=what, recorded=len(pair[0]), again=len(pair[1]), by=None, within=False)
            if len(places := (pair[0] != pair[1]).nonzero()[0]):
                what = f"conversation {one}, {name}[{places[0]}]"
                values = [int(side[places[0]]) for side in pair]
                return Gap(what=what, recorded=values[0], again=values[1], by=None, within=False)
    return Gap(what="conversations", recorded=len(ours), again=len(theirs), by=None, within=False)


def _first_state(sides: Sides) -> Gap | None:
    """Returns the first conversation's states that differ, if the run's own are still in the cache."""
    key = sides.lock.fingerprints["capture"]
    try:
        ours = StateStore.open(sides.cache / "states" / key[:16], key=key, verify=True)
        theirs = StateStore.open(sides.places.states(sides.plan))
    except ArtifactError:
        return None
    if ours.layout.lengths != theirs.layout.lengths:
        return Gap(
            what="tokens", recorded=sum(ours.layout.lengths), again=sum(theirs.layout.lengths), by=None, within=False
        )
    found = None
    for index in range(len(ours.layout.lengths)):
        for name, one, other in zip((STATES, LAST), ours.read(index), theirs.read(index), strict=True):
            told = tensor_gap(f"conversation {index}, {name}", one, other, sides.tolerance)
            if told is not None and not told.within:
                return told
            found = found or told
    return found


def _train(sides: Sides) -> list[Finding]:
    run, again, tolerance = sides.run, sides.again, sides.tolerance
    done, redone = (read_json(folder / TRAINED) for folder in (run, again))
    whole = isinstance(done, dict)
    found = compare_logs(run, again, tolerance=tolerance, whole=whole)
    found += compare_checkpoints(run, again, tolerance=tolerance)
    if not whole or not isinstance(redone, dict):
        return [*found, unknown("train", "weights", "the run's training was not finished")]
    gaps = [each for key in ("step", "total_steps", "tau") if (each := gap(key, done[key], redone[key], tolerance))]
    same = f"update {done['step']} of {done['total_steps']}"
    chosen = finding("train", "chosen", gaps, same=same, step=done["step"])
    if tolerance is not None and done["step"] != redone["step"]:
        # Near equals: another platform may well prefer another of them.
        near = gap("tau", done["tau"], redone["tau"], tolerance)
        result = WITHIN if near is None or near.within else DIFFERS
        why = "another update was chosen, so that the weights do not compare"
        return [*found, attrs.evolve(chosen, result=result), unknown("train", "weights", why)]
    speculators = compare_speculators(run / SPECULATOR, again / SPECULATOR, done["files"], tolerance=tolerance)
    at = [attrs.evolve(each, step=done["step"]) if each.result != SAME else each for each in speculators]
    return [*found, chosen, *at]


# Of a benchmark: whose result it is, where it was measured, and how fast it went.
_PLACES = ("fingerprint", "speculator", "verifier", "device", "threads", "format")
_TIMED = ("speed", "drafted_cost")
# What a tolerance can be held against; the rest are counts and intervals, which the same rounding moves in steps.
_LENGTHS = ("tau", "live_tau", "predicted_tau", "by_position")


def _bench(sides: Sides) -> list[Finding]:
    name = sides.lock.fingerprints["bench"][:8]
    recorded = read_json(sides.run / "bench" / f"{name}.json")
    again = read_json(sides.again / "bench" / f"{sides.plan.stage('bench').fingerprint[:8]}.json")
    if not isinstance(recorded, dict) or not isinstance(again, dict):
        side = "run" if not isinstance(recorded, dict) else "re-run"
        return [unknown("bench", "results", f"the {side} has no benchmark of these inputs")]
    one, other = (dict(_results(side)) for side in (recorded, again))
    names = [name for name in dict.fromkeys([*one, *other]) if sides.tolerance is None or _is_length(name)]
    gaps = [each for name in names if (each := gap(name, one.get(name), other.get(name), sides.tolerance))]
    same = f"{len(names)} numbers of {len(again['settings'])} settings; speeds are not compared"
    return [finding("bench", "results", gaps, same=same)]


def _is_length(name: str) -> bool:
    return name.rpartition(".")[2].partition("[")[0] in _LENGTHS


def _results(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of everything that was measured, speeds left out."""
    for key, value in result.items():
        if key == "settings":
            for setting in value:
                head = f"{setting['suite']}/K={setting['num_speculative_tokens']}/T={setting['temperature']:g}"
                yield from _leaves(head, setting)
        elif key not in _PLACES:
            yield from _leaves(key, value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, held in value.items():
            if key not in _TIMED:
                yield from _leaves(f"{path}.{key}", held)
    elif isinstance(value, list):
        for index, held in enumerate(value):
            yield from _leaves(f"{path}[{index}]", held)
    else:
        yield path, value


_COMPARES: dict[str, Callable[[Sides], list[Finding]]] = {
    "prepare": lambda sides: _files(sides, "prepare", _first_token),
    "capture": lambda sides: _files(sides, "capture", _first_state),
    "train": _train,
    "bench": _bench,
}
