"""A published checkpoint on disk: its config and the names and shapes of its tensors, never a pickle."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from speculators.errors import ArtifactError, VerifierError
from speculators.facts import VerifierFacts
from speculators.formats.published import PublishedCheckpoint
from speculators.runs.places import RunFolder
from speculators.verifier.sources import shard_index

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_source(path: Path) -> PublishedCheckpoint:
    """Returns what there is at a folder, or at a safetensors file with its config.json beside it.

    Raises:
        ArtifactError: there is no config.json or no safetensors, the weights are pickles, shards are missing, or an
            index names files elsewhere.
    """
    if path.suffix in _PICKLES and path.is_file():
        raise _pickled([path])
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ArtifactError(f"there is no checkpoint at {path}", hint="download it first: hf download OWNER/NAME")
    files = _files(folder) if path.is_dir() else [path]
    config = VerifierFacts.read(folder / "config.json").to_dict()
    held: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in held:
                    raise ArtifactError(f"{folder}: {name} is in {held[name].name} and in {file.name}")
                held[name], shapes[name] = file, tuple(shard.get_slice(name).get_shape())

    def read(name: str) -> torch.Tensor:
        with _opened(held[name]) as shard:
            return shard.get_tensor(name)

    return PublishedCheckpoint(folder, config, shapes, read)


def _files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: those of its index, or all."""
    try:
        named = sorted({*shard_index(folder).values()})
    except VerifierError as error:
        raise ArtifactError(str(error)) from error
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise ArtifactError(f"{folder} lacks {', '.join(missing)}, which its index names", hint="download it again")
    files = [folder / name for name in named] or sorted(folder.glob("*.safetensors"))
    if not files:
        if pickles := sorted(file for file in folder.iterdir() if file.suffix in _PICKLES):
            raise _pickled(pickles)
        inside = RunFolder(folder).speculator
        hint = f"it is a run, and the checkpoint is {inside}" if (inside / "config.json").is_file() else ""
        raise ArtifactError(f"{folder} has no weights (*.safetensors)", hint=hint)
    return files


def _pickled(files: list[Path]) -> ArtifactError:
    names = ", ".join(file.name for file in files)
    folder = files[0].parent
    program = (
        "import torch; from safetensors.torch import save_file; tensors = {}; "
        + " ".join(
            f"tensors.update(torch.load({file.name!r}, map_location='cpu', weights_only=True));" for file in files
        )
        + " save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, 'model.safetensors')"
    )
    # Whoever made the files chose their names, and people paste this into a shell.
    command = shlex.join(("python", "-c", program))
    return ArtifactError(
        f"{folder} has its weights only as {names}: a pickle can run any program when it is read, so it is not opened",
        hint=f"torch reads tensors alone with weights_only; in {folder}:\n  {command}\nthen import again",
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: truncated, or not safetensors: {error}", hint="download it again") from error
