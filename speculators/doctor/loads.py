"""Does it load: files, config, every tensor there, used, of the expected shape and finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speculators.doctor.check import WRONG, Check, Family, listed
from speculators.doctor.subject import Origin, Patient, filled, with_knobs
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.files.disk import file_sha256
from speculators.model import SpeculatorModel, read_config, read_weights, rebuild
from speculators.runs.places import RunFolder
from speculators.runs.stages import TrainingRecord

LOADS = Family("loads")
AGAIN = "export the run again (spec run of its recipe), copy the folder again, or import the checkpoint again"


def read_files(folder: Path) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None, list[Check]]:
    """Returns config.json and the tensors, None for what cannot be read, and what was found."""
    checks, raw, tensors = [], None, None
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw = held if isinstance(held, dict) else None
        problem = "" if raw is not None else "config.json is not a JSON object"
    except (OSError, ValueError) as error:
        problem = f"config.json cannot be read: {error}"
    try:
        tensors = read_weights(folder)
    except (ArtifactError, OSError) as error:
        problem = problem or str(error)
    if problem:
        checks.append(LOADS.wrong("files", problem, AGAIN))
    else:
        assert tensors is not None
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6
        checks.append(LOADS.ok("files", f"{len(tensors)} tensors, {size:,.1f} MB, {', '.join(kinds)}"))
    return raw, tensors, checks


def altered(folder: Path, origin: Origin | None) -> Iterator[Check]:
    """Compares the files with those that the run wrote."""
    if origin is None:
        return
    run = RunFolder(origin.folder)
    record = TrainingRecord.read(run)
    if record is None:
        yield LOADS.skipped("as exported", f"the run has no {run.trained.name}: its training was not finished")
        return
    changed = [name for name, digest in record.files.items() if not _is(folder / name, digest)]
    if changed:
        words = f"{listed(changed)}: not what the run wrote (sha256)"
        yield LOADS.warning("as exported", words, "what the change did is told below; spec run exports again")
    else:
        yield LOADS.ok("as exported", f"{len(record.files)} files are those that the run wrote (sha256)")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def build(patient: Patient) -> list[Check]:
    """Builds the patient's model and fills it; sets `config`, `model` and `trainable` as far as that works."""
    checks: list[Check] = []
    try:
        patient.config = with_knobs(read_config(patient.folder), patient.origin)
        blank = rebuild(patient.config, patient.folder)
    except SpeculatorsError as error:
        return [LOADS.wrong("config.json", str(error), AGAIN)]
    patient.trainable = frozenset(name for name, one in blank.named_parameters() if one.requires_grad)
    checks += _tensors(patient, blank)
    checks += finite(patient.tensors)
    if all(check.result != WRONG for check in checks):
        patient.model = filled(patient.config, patient.folder, patient.tensors, patient.verifier, patient.device)
    return checks


def _tensors(patient: Patient, blank: SpeculatorModel) -> Iterator[Check]:
    """Yields two checks: the names, then the shapes."""
    wanted, held = blank.saved_names(blank.state_dict()), patient.tensors
    missing, unknown = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    told = [f"missing: {listed(missing)} (a server may fill it at random)"] * bool(missing)
    told += [f"not used by this algorithm: {listed(unknown)}"] * bool(unknown)
    if told:
        yield LOADS.wrong("tensors", "; ".join(told), AGAIN)
    else:
        yield LOADS.ok("tensors", f"all {len(wanted)} are there, and each is used")
    both = sorted(set(wanted) & set(held))
    wrong = [
        f"{name} is {list(held[name].shape)}, config.json means {list(wanted[name].shape)}"
        for name in both
        if held[name].shape != wanted[name].shape
    ]
    if wrong:
        todo = f"correct config.json ({_sizes(patient.decoder)}), or take the weights that belong to it"
        yield LOADS.wrong("shapes", listed(wrong, 3), todo)
    else:
        yield LOADS.ok("shapes", f"{len(both)} as config.json means them")


def _sizes(decoder: dict[str, Any]) -> str:
    names = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    return ", ".join(f"{name} {decoder[name]}" for name in names if name in decoder)


def finite(tensors: dict[str, torch.Tensor]) -> Iterator[Check]:
    """Looks for what is no number, and for matrices of zeros."""
    bad, empty = [], []
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            continue
        if count := int((~torch.isfinite(tensor)).sum()):
            bad.append(f"{name} ({count} of {tensor.numel():,})")
        elif tensor.ndim > 1 and not tensor.any():
            empty.append(name)
    if bad:
        yield LOADS.wrong("finite", f"NaN or infinite: {listed(bad)}", "take an earlier checkpoint; lower the rate")
    elif empty:
        words = f"all zero: {listed(empty)}: never trained, or lost on the way"
        yield LOADS.warning("finite", words, "train longer, or export again")
    else:
        yield LOADS.ok("finite", "every number is finite, no matrix is all zero")
