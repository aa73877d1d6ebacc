"""Which stages of a plan are on disk, complete and intact: what a run skips and what `spec plan` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from speculators.bench.result import FORMAT, BenchResult
from speculators.data.encoded import Conversations
from speculators.data.shard_files import RemoteFiles
from speculators.data.store import Check, StateStore
from speculators.errors import ArtifactError, DataError
from speculators.files.disk import file_sha256, read_json, write_json
from speculators.recipe.plan import Plan
from speculators.recipe.stages import Stage
from speculators.runs.places import Places, RunFolder
from speculators.structure.converter import structure
from speculators.verifier.sources import existing_folder

_CPU = torch.device("cpu")
# Before K in the metrics of an evaluation: acceptance length at a K below the largest.
TAU_AT = "tau_"


@attrs.frozen(kw_only=True)
class TrainingRecord:
    """The last thing that training writes into a run folder.

    Attributes:
        fingerprint: of the stage `train`.
        checkpoint: name of the exported checkpoint's folder.
        step: updates of the exported checkpoint, of `total_steps`.
        tau: its exact acceptance length; None where the recipe names no suite.
        seconds: spent by the launch that ended training.
        files: sha256 of each file of the exported speculator, by name.
    """

    fingerprint: str
    checkpoint: str
    step: int
    total_steps: int
    tau: float | None
    seconds: float
    files: dict[str, str]

    @classmethod
    def read(cls, run: RunFolder) -> TrainingRecord | None:
        """Reads the record of a run; None while training has not ended, or where the file is damaged."""
        return _read(cls, read_json(run.trained))

    def write(self, run: RunFolder) -> None:
        """Writes the record, after which the stage counts as done."""
        write_json(run.trained, attrs.asdict(self))


@attrs.frozen(kw_only=True)
class MadeFiles:
    """What a stage made in the cache.

    Attributes:
        fingerprint: of the stage.
        files: sha256 of each file, by name.
    """

    fingerprint: str
    files: dict[str, str]


def _read(cls: type[Any], values: Any) -> Any:
    """Builds one of the records above from JSON values; other versions may have written further keys."""
    if not isinstance(values, dict):
        return None
    known = {field.name: values[field.name] for field in attrs.fields(cls) if field.name in values}
    return structure(known, cls)[0]


def on_disk(plan: Plan, places: Places) -> dict[str, bool]:
    """Says for each stage whether its output is there; leaves out hub models, which only their own client knows."""
    verifier = plan.recipe.verifier
    done = {} if verifier.kind == "hub" else {"verifier": existing_folder(verifier, cache=places.verifiers) is not None}
    done["prepare"] = is_prepared(plan, places)
    if plan.recipe.data.stored:
        done["capture"] = is_captured(plan, places)
    done["train"] = trained(plan, places) is not None
    if plan.recipe.benchmark.suites:
        done["bench"] = measured(plan, places) is not None
    return done


def is_prepared(plan: Plan, places: Places, *, verify: bool = False) -> bool:
    """Whether the conversations are there; `verify` compares hashes, not only sizes."""
    try:
        Conversations.open(places.prepared(plan), key=plan.stage("prepare").fingerprint, verify=verify)
    except ArtifactError:
        return False
    return True


def open_states(plan: Plan, places: Places, *, check: Check = "headers", device: torch.device = _CPU) -> StateStore:
    """Opens the stored hidden states of a plan, in the cache or under its `data.store`; `check` as for `StateStore`.

    Raises:
        ArtifactError: they are not there, incomplete or damaged.
        DataError: the object store cannot be read.
    """
    key, store = plan.stage("capture").fingerprint, plan.recipe.data.store
    if store is None:
        return StateStore.open(places.states(key), key=key, check=check, device=device)
    files = RemoteFiles.at(places.uploaded_states(store, key))
    # Every conversation is compared when it is read. Checking headers would take several requests for each shard.
    check = "none" if check == "headers" else check
    try:
        return StateStore.of(files, key=key, check=check, device=device)
    except ArtifactError as error:
        hint = f"a run without data.store captures them: copy {places.states(key)} to {files.place}"
        raise ArtifactError(str(error).partition("\n")[0], hint=hint) from None


def is_captured(plan: Plan, places: Places) -> bool:
    """Whether the hidden states are there: checks names, sizes and headers, or an object store's manifest."""
    try:
        open_states(plan, places)
    except (ArtifactError, DataError):
        return False
    return True


def trained(plan: Plan, places: Places) -> TrainingRecord | None:
    """Reads the plan's training record; None if its speculator is missing or was altered since."""
    run = places.run(plan)
    record = TrainingRecord.read(run)
    if record is None or record.fingerprint != plan.stage("train").fingerprint:
        return None
    files = {run.speculator / name: digest for name, digest in record.files.items()}
    return record if all(path.is_file() and file_sha256(path) == digest for path, digest in files.items()) else None


def note_made(run: RunFolder, stage: Stage, files: Mapping[str, str]) -> None:
    """Records the sha256 of what a stage made in the cache, which may be gone when it is compared."""
    before = read_json(run.made)
    note = attrs.asdict(MadeFiles(fingerprint=stage.fingerprint, files=dict(files)))
    write_json(run.made, {**(before if isinstance(before, dict) else {}), stage.name: note})


def made(run: RunFolder) -> dict[str, MadeFiles]:
    """Reads what `note_made` recorded, by stage."""
    notes = read_json(run.made)
    stages = {name: _read(MadeFiles, note) for name, note in (notes if isinstance(notes, dict) else {}).items()}
    return {name: note for name, note in stages.items() if note is not None}


def measured(plan: Plan, places: Places) -> BenchResult | None:
    """Reads the plan's benchmark; None if it was not made, or in a format that this version does not read."""
    fingerprint = plan.stage("bench").fingerprint
    values = read_json(places.run(plan).benchmark(fingerprint))
    ours = isinstance(values, dict) and values.get("fingerprint") == fingerprint
    return structure(values, BenchResult)[0] if ours and values.get("format") == FORMAT else None
