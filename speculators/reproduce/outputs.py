"""Compares what the stages of a run and of its re-run made: conversations, states, training, benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from speculators.data.encoded import Conversations
from speculators.data.state_types import LAST, STATES
from speculators.data.store import StateStore
from speculators.errors import ArtifactError
from speculators.files.disk import read_json
from speculators.recipe.lock import Lock
from speculators.recipe.plan import Plan
from speculators.reproduce.findings import DIFFERS, SAME, UNKNOWN, WITHIN, Finding, Gap, finding, gap, unknown
from speculators.reproduce.logs import compare_logs
from speculators.reproduce.tensors import compare_checkpoints, compare_speculators, tensor_gap
from speculators.runs.places import Places, RunFolder
from speculators.runs.stages import TrainingRecord, made


@attrs.frozen(kw_only=True)
class RunPair:
    """A run and its re-run.

    Attributes:
        run: the folder of the run.
        lock: the run's lock.
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
        return self.places.run(self.plan).path


def compare(stage: str, pair: RunPair) -> list[Finding]:
    """Compares the outputs of one stage; the verifier is an input, and was checked before."""
    return _COMPARISONS[stage](pair) if stage in _COMPARISONS else []


def _files(pair: RunPair, stage: str, detail: Callable[[RunPair], Gap | None]) -> list[Finding]:
    """Compares the hashes of a stage's files; `detail` locates the difference if the run's files are still there."""
    recorded, again = (made(RunFolder(folder)).get(stage) for folder in (pair.run, pair.again))
    if recorded is None or again is None:
        return [unknown(stage, "files", f"the {'run' if recorded is None else 're-run'} kept no hashes of it")]
    differ = [
        name
        for name in dict.fromkeys([*recorded.files, *again.files])
        if recorded.files.get(name) != again.files.get(name)
    ]
    if not differ:
        return [finding(stage, "files", [], same=f"{len(again.files)} by sha256")]
    if (located := detail(pair)) is not None:
        difference = finding(stage, "files", [located], same="")
        return [attrs.evolve(difference, evidence=f"{', '.join(differ)}: {difference.evidence}")]
    # States are numbers: a hash does not distinguish another platform's rounding from other text.
    result = UNKNOWN if stage == "capture" and pair.tolerance is not None else DIFFERS
    return [
        Finding(
            stage=stage,
            check="files",
            result=result,
            evidence=f"{', '.join(differ)}: the sha256 differs; the run's own files are no longer in {pair.cache}",
            what=differ[0],
            recorded=recorded.files.get(differ[0]),
            again=again.files.get(differ[0]),
        )
    ]


def _first_token(pair: RunPair) -> Gap | None:
    """Locates the first conversation that differs, if the run's own are still in the cache."""
    key = pair.lock.fingerprints["prepare"]
    try:
        ours = Conversations.open(Places(cache=pair.cache).conversations(key), key=key, verify=True)
        theirs = Conversations.open(pair.places.prepared(pair.plan))
    except ArtifactError:
        return None
    now = {name: file["sha256"] for name, file in ours.manifest["files"].items()}
    if made(RunFolder(pair.run))["prepare"].files != now:
        return None
    for index, (one, other) in enumerate(zip(ours.ids(), theirs.ids(), strict=False)):
        if one != other:
            return Gap(what=f"conversation {index}", recorded=one, again=other)
        row, row_again = ours.row(index), theirs.row(index)
        for name in ("input_ids", "loss_mask"):
            recorded, again = getattr(row, name), getattr(row_again, name)
            if len(recorded) != len(again):
                return Gap(what=f"conversation {one}, tokens", recorded=len(recorded), again=len(again))
            if len(places := (recorded != again).nonzero()[0]):
                place = places[0]
                what = f"conversation {one}, {name}[{place}]"
                return Gap(what=what, recorded=int(recorded[place]), again=int(again[place]))
    return Gap(what="conversations", recorded=len(ours), again=len(theirs))


def _first_state(pair: RunPair) -> Gap | None:
    """Locates the first conversation whose states differ, if the run's own are still in the cache."""
    key = pair.lock.fingerprints["capture"]
    try:
        ours = StateStore.open(Places(cache=pair.cache).states(key), key=key, check="all")
        theirs = StateStore.open(pair.places.states(pair.plan.stage("capture").fingerprint))
    except ArtifactError:
        return None
    if not np.array_equal(ours.layout.lengths, theirs.layout.lengths):
        tokens = [int(store.layout.lengths.sum()) for store in (ours, theirs)]
        return Gap(what="tokens", recorded=tokens[0], again=tokens[1])
    if ours.layout.parts != theirs.layout.parts:
        columns = [[part.columns for part in store.layout.parts] for store in (ours, theirs)]
        return Gap(what="columns of a shard", recorded=columns[0], again=columns[1])
    tolerated = None
    for index in range(len(ours.layout.lengths)):
        for name, one, other in zip((STATES, LAST), ours.read(index), theirs.read(index), strict=True):
            difference = tensor_gap(f"conversation {index}, {name}", one, other, pair.tolerance)
            if difference is not None and not difference.within:
                return difference
            tolerated = tolerated or difference
    return tolerated


def _train(pair: RunPair) -> list[Finding]:
    run, again, tolerance = pair.run, pair.again, pair.tolerance
    done, redone = (TrainingRecord.read(RunFolder(folder)) for folder in (run, again))
    findings = compare_logs(run, again, tolerance=tolerance, whole=done is not None)
    findings += compare_checkpoints(run, again, tolerance=tolerance)
    if done is None or redone is None:
        return [*findings, unknown("train", "weights", "the run's training was not finished")]
    pairs = {key: (getattr(done, key), getattr(redone, key)) for key in ("step", "total_steps", "tau")}
    gaps = [each for key, values in pairs.items() if (each := gap(key, *values, tolerance))]
    same = f"update {done.step} of {done.total_steps}"
    chosen = finding("train", "chosen", gaps, same=same, step=done.step)
    if tolerance is not None and done.step != redone.step:
        # Evaluations may be nearly equal: rounding on another platform may well prefer another of them.
        near = gap("tau", done.tau, redone.tau, tolerance)
        result = WITHIN if near is None or near.within else DIFFERS
        why = "another update was chosen, so the weights cannot be compared"
        return [*findings, attrs.evolve(chosen, result=result), unknown("train", "weights", why)]
    one, other = RunFolder(run).speculator, RunFolder(again).speculator
    speculators = compare_speculators(one, other, done.files, tolerance=tolerance)
    at = [attrs.evolve(each, step=done.step) if each.result != SAME else each for each in speculators]
    return [*findings, chosen, *at]


# Keys of a benchmark that say whose result it is, where it was measured, and how fast it went.
_PLACES = ("fingerprint", "speculator", "verifier", "device", "threads", "others", "format")
_TIMED = ("speed", "drafted_cost")
# Other views of what `by_prompt` and `by_position` count; older results lack them.
_FURTHER = ("by_context", "by_place", "by_position_interval", "counts_by_prompt", "difference")
# Values to which a tolerance applies; the rest are counts and intervals, which rounding moves in steps.
_LENGTHS = ("tau", "live_tau", "predicted_tau", "by_position")


def _bench(pair: RunPair) -> list[Finding]:
    recorded = read_json(RunFolder(pair.run).benchmark(pair.lock.fingerprints["bench"]))
    again = read_json(RunFolder(pair.again).benchmark(pair.plan.stage("bench").fingerprint))
    if not isinstance(recorded, dict) or not isinstance(again, dict):
        side = "run" if not isinstance(recorded, dict) else "re-run"
        return [unknown("bench", "results", f"the {side} has no benchmark of these inputs")]
    one, other = (dict(_results(side)) for side in (recorded, again))
    names = [name for name in dict.fromkeys([*one, *other]) if pair.tolerance is None or _is_length(name)]
    gaps = [each for name in names if (each := gap(name, one.get(name), other.get(name), pair.tolerance))]
    same = f"{len(names)} numbers of {len(again['settings'])} settings; speeds are not compared"
    return [finding("bench", "results", gaps, same=same)]


def _is_length(name: str) -> bool:
    return name.rpartition(".")[2].partition("[")[0] in _LENGTHS


def _results(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of everything that was measured, except speeds."""
    for key, value in result.items():
        if key == "settings":
            for setting in value:
                head = f"{setting['suite']}/K={setting['num_speculative_tokens']}/T={setting['temperature']:g}"
                yield from _leaves(head, setting)
        elif key not in _PLACES:
            yield from _leaves(key, value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in (*_TIMED, *_FURTHER):
                yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(f"{path}[{index}]", item)
    else:
        yield path, value


_COMPARISONS: dict[str, Callable[[RunPair], list[Finding]]] = {
    "prepare": lambda pair: _files(pair, "prepare", _first_token),
    "capture": lambda pair: _files(pair, "capture", _first_state),
    "train": _train,
    "bench": _bench,
}
