"""Compares the weights of a run and of its re-run: which tensor differs first, in how many elements, by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import attrs
import torch
from safetensors import SafetensorError, safe_open

from speculators.errors import ArtifactError
from speculators.files.disk import file_sha256, read_json
from speculators.files.folders import verify
from speculators.reproduce.findings import DIFFERS, Finding, Gap, finding, unknown
from speculators.runs.places import RunFolder
from speculators.training import snapshot
from speculators.training.checkpoint import complete

WEIGHTS = "model.safetensors"

Read = Callable[[str], torch.Tensor]


def tensor_gap(name: str, recorded: torch.Tensor, again: torch.Tensor, tolerance: float | None) -> Gap | None:
    """Compares two tensors; None where they have the same bits.

    Args:
        tolerance: norm of the difference, relative to that of `recorded`; None where only the same bits will do.
    """
    shapes = [f"{list(tensor.shape)} {tensor.dtype}" for tensor in (recorded, again)]
    if shapes[0] != shapes[1]:
        return Gap(what=name, recorded=shapes[0], again=shapes[1])
    # As bytes, for 0.0 == -0.0 and nan != nan.
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (recorded, again)]
    if torch.equal(*bits):
        return None
    one, other = (tensor.reshape(-1).double() for tensor in (recorded, again))
    # An element that is nan on one side only is as far off as can be.
    off = (one - other).abs().nan_to_num(nan=torch.inf)
    place = int(off.argmax())
    within = tolerance is not None and bool(torch.linalg.vector_norm(off) <= tolerance * torch.linalg.vector_norm(one))
    count = int((bits[0] != bits[1]).view(one.numel(), -1).any(1).sum())
    index = [int(part) for part in torch.unravel_index(torch.tensor(place), recorded.shape)]
    what = f"{name}{index} ({count} of {one.numel()} elements differ)" if index else name
    return Gap(what=what, recorded=float(one[place]), again=float(other[place]), by=float(off[place]), within=within)


def tensor_gaps(
    recorded: Iterable[str], again: Iterable[str], read: Read, reread: Read, tolerance: float | None
) -> list[Gap]:
    """Compares tensors by name; those that only one side has come first, then the rest in their order."""
    one, other = list(recorded), list(again)
    gaps = [Gap(what=name, recorded=name in one, again=name in other) for name in sorted({*one} ^ {*other})]
    pairs = ((name, read(name), reread(name)) for name in one if name in other)
    return gaps + [each for pair in pairs if (each := tensor_gap(*pair, tolerance)) is not None]


def compare_checkpoints(run: Path, again: Path, *, tolerance: float | None) -> list[Finding]:
    """Compares the checkpoints that both still have, up to the first tensor that differs.

    Their optimizer state counts only where bits do: a second moment may be off by more than the weights it moves.
    """
    kept = {path.name: path for path in complete(RunFolder(run).checkpoints)}
    both = [(kept[path.name], path) for path in complete(RunFolder(again).checkpoints) if path.name in kept]
    if not both:
        return [unknown("train", "checkpoints", "the run and the re-run kept no checkpoint of the same update")]
    for ours, theirs in both:
        step = int(ours.name.removeprefix("step-"))
        try:
            verify(ours, hint="")
        except ArtifactError as error:
            evidence = f"altered since it was written: {error}"
            return [Finding(stage="train", check="checkpoints", result=DIFFERS, evidence=evidence, step=step)]
        names, others = (
            [name for name in snapshot.names(side) if tolerance is None or name.startswith("model.")]
            for side in (ours, theirs)
        )
        read, reread = (partial(snapshot.read_tensor, side) for side in (ours, theirs))
        if gaps := tensor_gaps(names, others, read, reread, tolerance):
            return [finding("train", "checkpoints", gaps, same="", step=step)]
    steps = ", ".join(str(int(ours.name.removeprefix("step-"))) for ours, _ in both)
    scope = "every tensor, including the optimizer's" if tolerance is None else "every weight"
    return [finding("train", "checkpoints", [], same=f"update {steps}: {scope}")]


def compare_speculators(run: Path, again: Path, files: dict[str, str], *, tolerance: float | None) -> list[Finding]:
    """Compares the exported speculators: weights, and config.json without the path of the verifier.

    Args:
        run, again: the folders `speculator`.
        files: the sha256 of each file when the run wrote it.
    """
    altered = [name for name, digest in files.items() if not _is(run / name, digest)]
    note = f"; {', '.join(altered)} in the run was altered after the run wrote it" if altered else ""
    try:
        with safe_open(run / WEIGHTS, "pt") as ours, safe_open(again / WEIGHTS, "pt") as theirs:
            names = ours.keys()
            gaps = tensor_gaps(names, theirs.keys(), ours.get_tensor, theirs.get_tensor, tolerance)
    except (OSError, SafetensorError) as error:
        evidence = f"cannot be read: {error}{note}"
        return [Finding(stage="train", check="weights", result=DIFFERS, evidence=evidence, what=WEIGHTS)]
    weights = finding("train", "weights", gaps, same=f"{len(names)} tensors of the speculator, bit for bit")
    one, other = (_without_places(read_json(folder / "config.json")) for folder in (run, again))
    gaps = [
        Gap(what=key, recorded=one.get(key), again=other.get(key))
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]
    config = finding("train", "config.json", gaps, same="every value except the verifier's path")
    if altered and all(each.result != DIFFERS for each in (weights, config)):
        # Bytes that no comparison reads, such as a header's, are still not what the run wrote.
        files_altered = Finding(stage="train", check="files", result=DIFFERS, evidence=note.removeprefix("; "))
        return [weights, config, files_altered]
    return [_with_note(each, note) for each in (weights, config)]


def _with_note(compared: Finding, note: str) -> Finding:
    return attrs.evolve(compared, evidence=compared.evidence + note) if compared.result == DIFFERS else compared


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def _without_places(config: object) -> dict[str, object]:
    """Removes the paths of the machine that wrote a config."""

    def cleaned(value: object) -> object:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if key != "name_or_path"}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    result = cleaned(config)
    return result if isinstance(result, dict) else {"config.json": result}
