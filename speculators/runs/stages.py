"""Which stages of a plan are on disk, complete and intact: what a run skips and what `spec plan` tells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.bench.result import FORMAT, BenchResult
from speculators.data.encoded import Conversations
from speculators.data.store import StateStore
from speculators.errors import ArtifactError
from speculators.files.disk import file_sha256, read_json, write_json
from speculators.recipe.plan import Plan
from speculators.recipe.stages import Stage
from speculators.runs.places import Places
from speculators.structure.converter import structure
from speculators.verifier.sources import existing_folder

TRAINED = "train.json"
# Before K in the metrics of an evaluation: acceptance length at a K below the largest.
TAU_AT = "tau_"
MADE = "made.json"
SPECULATOR = "speculator"


def on_disk(plan: Plan, places: Places) -> dict[str, bool]:
    """Returns for each stage whether its output is there; of a hub's model its own client knows, so it is left out."""
    verifier = plan.recipe.verifier
    known = (
        {} if verifier.kind == "hub" else {"verifier": existing_folder(verifier, cache=places.verifiers) is not None}
    )
    known["prepare"] = is_prepared(plan, places)
    if plan.recipe.data.stored:
        known["capture"] = is_captured(plan, places)
    known["train"] = trained(plan, places) is not None
    if plan.recipe.benchmark.suites:
        known["bench"] = measured(plan, places) is not None
    return known


def is_prepared(plan: Plan, places: Places, *, verify: bool = False) -> bool:
    """Returns whether the conversations are there; `verify` compares hashes, not only sizes."""
    try:
        Conversations.open(places.prepared(plan), key=plan.stage("prepare").fingerprint, verify=verify)
    except ArtifactError:
        return False
    return True


def is_captured(plan: Plan, places: Places) -> bool:
    """Returns whether the hidden states are there, by names, sizes and headers."""
    try:
        StateStore.open(places.states(plan), key=plan.stage("capture").fingerprint)
    except ArtifactError:
        return False
    return True


def trained(plan: Plan, places: Places) -> dict[str, Any] | None:
    """Returns what training left in the run folder as its last act; None if the speculator is not there, or altered."""
    folder = places.run(plan)
    held = _of(folder / TRAINED, plan, "train")
    if held is None:
        return None
    files = {folder / SPECULATOR / name: digest for name, digest in held["files"].items()}
    return held if all(path.is_file() and file_sha256(path) == digest for path, digest in files.items()) else None


def note_made(folder: Path, stage: Stage, files: Mapping[str, str]) -> None:
    """Keeps in the run folder the sha256 of what a stage made in the cache, which may be gone when it is asked for."""
    held = made(folder)
    write_json(folder / MADE, {**held, stage.name: {"fingerprint": stage.fingerprint, "files": dict(files)}})


def made(folder: Path) -> dict[str, Any]:
    """Returns what `note_made` kept in a run folder: fingerprint and files of each stage."""
    held = read_json(folder / MADE)
    return held if isinstance(held, dict) else {}


def bench_file(plan: Plan, places: Places) -> Path:
    """Returns where the benchmark of a plan is kept."""
    return places.run(plan) / "bench" / f"{plan.stage('bench').fingerprint[:8]}.json"


def served_folder(run: Path) -> Path:
    """Returns where the benchmarks of servers are kept of a run."""
    return run / "bench" / "served"


def measured(plan: Plan, places: Places) -> BenchResult | None:
    """Reads the benchmark of a plan; None where there is none of these inputs that this version can read."""
    document = _of(bench_file(plan, places), plan, "bench")
    if document is None or document.get("format") != FORMAT:
        return None
    result, _ = structure(document, BenchResult)
    return result


def _of(path: Path, plan: Plan, stage: str) -> dict[str, Any] | None:
    """Returns a JSON object that the stage of this plan wrote."""
    held = read_json(path)
    ours = isinstance(held, dict) and held.get("fingerprint") == plan.stage(stage).fingerprint
    return held if ours else None
