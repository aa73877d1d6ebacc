"""Opens a published checkpoint: its config and the names and shapes of its tensors, never a pickle."""

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


def open_published(path: Path) -> PublishedCheckpoint:
    """Opens the checkpoint in a folder, or in a safetensors file with config.json beside it.

    Raises:
        ArtifactError: config.json or the weights are missing, the weights are pickles, shards are missing, or the
            index names files outside the folder.
    """
    if path.suffix in _PICKLES and path.is_file():
        raise _pickled([path])
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ArtifactError(f"there is no checkpoint at {path}", hint="download it first: hf download OWNER/NAME")
    files = _files(folder) if path.is_dir() else [path]
    config = VerifierFacts.read(folder / "config.json").to_dict()
    files_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in files_of:
                    raise ArtifactError(f"{folder}: {name} is in {files_of[name].name} and in {file.name}")
                files_of[name], shapes[name] = file, tuple(shard.get_slice(name).get_shape())

    def read(name: str) -> torch.Tensor:
        with _opened(files_of[name]) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
            return tensor

    return PublishedCheckpoint(folder, config, shapes, read)


def _files(folder: Path) -> list[Path]:
    """Lists the safetensors files of a folder: those in its index, or all if it has no index."""
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
        hint = f"this is a run; the checkpoint is {inside}" if (inside / "config.json").is_file() else ""
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
    # Users paste this into a shell, and the author of the files chose their names: quote them.
    command = shlex.join(("python", "-c", program))
    return ArtifactError(
        f"{folder} has its weights only as {names}: reading a pickle can run any program, so it is not opened",
        hint=f"with weights_only, torch reads nothing but tensors. In {folder}, run\n  {command}\nand import again",
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: truncated, or not safetensors: {error}", hint="download it again") from error
