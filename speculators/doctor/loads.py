"""Checks that the speculator loads: files, config, and every tensor present, used, well-shaped and finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speculators.doctor.check import WRONG, Check, Family, listed
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun, filled, with_knobs
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.files.disk import file_sha256
from speculators.model import SpeculatorModel, read_config, read_weights, rebuild
from speculators.runs.places import RunFolder
from speculators.runs.stages import TrainingRecord

LOADS = Family("loads")
AGAIN = "export the run again (spec run with its recipe), copy the folder again, or import the checkpoint again"


def read_files(folder: Path) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None, list[Check]]:
    """Reads config.json and the tensors (None if unreadable), with the check of the files."""
    checks, raw, tensors = [], None, None
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw = content if isinstance(content, dict) else None
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


def altered(folder: Path, origin: TrainingRun | None) -> Iterator[Check]:
    """Compares the files with the hashes that the run recorded when it exported them."""
    if origin is None:
        return
    run = RunFolder(origin.folder)
    record = TrainingRecord.read(run)
    if record is None:
        yield LOADS.skipped("as exported", f"the run has no {run.trained.name}, so its training did not finish")
        return
    changed = [name for name, digest in record.files.items() if not _is(folder / name, digest)]
    if changed:
        evidence = f"{listed(changed)}: changed since the run wrote it (sha256)"
        todo = "see the other checks for the effect of the change; spec run exports again"
        yield LOADS.warning("as exported", evidence, todo)
    else:
        yield LOADS.ok("as exported", f"{len(record.files)} files are as the run wrote them (sha256)")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def build(speculator: ExaminedSpeculator) -> list[Check]:
    """Builds and fills the model; sets `config`, `trainable` and `model` as far as the checkpoint allows."""
    checks: list[Check] = []
    try:
        speculator.config = with_knobs(read_config(speculator.folder), speculator.origin)
        blank = rebuild(speculator.config, speculator.folder)
    except SpeculatorsError as error:
        return [LOADS.wrong("config.json", str(error), AGAIN)]
    speculator.trainable = frozenset(name for name, one in blank.named_parameters() if one.requires_grad)
    checks += _tensors(speculator, blank)
    checks += finite(speculator.tensors)
    if all(check.result != WRONG for check in checks):
        speculator.model = filled(
            speculator.config, speculator.folder, speculator.tensors, speculator.verifier, speculator.device
        )
    return checks


def _tensors(speculator: ExaminedSpeculator, blank: SpeculatorModel) -> Iterator[Check]:
    """Yields the check of the tensors' names, then that of their shapes."""
    expected, saved = blank.saved_names(blank.state_dict()), speculator.tensors
    missing, unknown = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
    problems = [f"missing: {listed(missing)} (a server may fill it at random)"] * bool(missing)
    problems += [f"not used by this algorithm: {listed(unknown)}"] * bool(unknown)
    if problems:
        yield LOADS.wrong("tensors", "; ".join(problems), AGAIN)
    else:
        yield LOADS.ok("tensors", f"all {len(expected)} are there, and each is used")
    both = sorted(set(expected) & set(saved))
    wrong = [
        f"{name} is {list(saved[name].shape)}, but config.json implies {list(expected[name].shape)}"
        for name in both
        if saved[name].shape != expected[name].shape
    ]
    if wrong:
        todo = f"correct config.json ({_sizes(speculator.decoder)}), or use the weights that belong to it"
        yield LOADS.wrong("shapes", listed(wrong, 3), todo)
    else:
        yield LOADS.ok("shapes", f"{len(both)} tensors have the shapes that config.json implies")


def _sizes(decoder: dict[str, Any]) -> str:
    names = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    return ", ".join(f"{name} {decoder[name]}" for name in names if name in decoder)


def finite(tensors: dict[str, torch.Tensor]) -> Iterator[Check]:
    """Looks for NaN, infinity and matrices of zeros."""
    bad, empty = [], []
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            continue
        if count := int((~torch.isfinite(tensor)).sum()):
            bad.append(f"{name} ({count} of {tensor.numel():,})")
        elif tensor.ndim > 1 and not tensor.any():
            empty.append(name)
    if bad:
        yield LOADS.wrong(
            "finite",
            f"NaN or infinite: {listed(bad)}",
            "use an earlier checkpoint, or a lower learning rate",
        )
    elif empty:
        evidence = f"all zero: {listed(empty)}: never trained, or lost in a conversion"
        yield LOADS.warning("finite", evidence, "train longer, or export again")
    else:
        yield LOADS.ok("finite", "every number is finite, no matrix is all zero")
