"""Writes and reads a checkpoint's tensors with torch.distributed.checkpoint, for any number of processes."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from speculators.errors import ArtifactError
from speculators.training import rng
from speculators.training.average import AVERAGE
from speculators.training.optimizer import Optimizer
from speculators.training.world import World

# torch keeps the index of a checkpoint in a pickle, and reading a pickle can run any program. These are the classes in
# our checkpoints. BytesStorageMetadata is not among them: torch would open what it points to as a pickle, too.
METADATA = ".metadata"
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # where Python 3.13 keeps it
}


# Before the names of the optimizer's tensors, as "model." is before those of the model.
OPTIMIZER = "optimizer."


class _Unpickler(pickle.Unpickler):
    """Reads the classes above and dtypes; refuses everything else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which our checkpoints never contain")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, with the index read by `metadata_of`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = metadata_of(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def metadata_of(folder: Path) -> Metadata:
    """Reads the index of a checkpoint's tensors.

    Raises:
        ArtifactError: it is damaged, or was not written by this package.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    # Damaged bytes can raise anything inside pickle.
    except Exception as error:
        hint = "it was not opened, because a pickle can run any program: copy the checkpoint again, or remove it"
        raise ArtifactError(f"{folder / METADATA}: not a checkpoint of ours: {error}", hint=hint) from error
    if not (isinstance(metadata, Metadata) and metadata.storage_meta is not None):
        raise ArtifactError(f"{folder / METADATA}: not a checkpoint of ours: it is a {type(metadata).__name__}")
    return metadata


def write(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Writes model, optimizer and this process's random number generators into `folder`; every process calls this.

    Raises:
        OSError, RuntimeError: on the process that failed; inside dcp, CheckpointException on all processes.
    """
    with _alone_is_fine():
        dcp.save(
            _tensors(model, optimizer),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            # A slow disk may keep one process writing for long.
            process_group=world.control,
            no_dist=world.size == 1,
        )
    (folder / _rng_file(world.rank)).write_text(json.dumps(rng.capture()), encoding="utf-8")


def read(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Reads model and optimizer back, in place, sharded as they are now; raises ArtifactError like `metadata_of`."""
    # Only tensors that exist can be loaded into.
    optimizer.prime()
    _load(folder, _tensors(model, optimizer), world)


def read_rng(folder: Path, world: World) -> None:
    """Restores this process's random number generators."""
    rng.restore(json.loads((folder / _rng_file(world.rank)).read_text(encoding="utf-8")))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads only the weights, averaged where the run averages them, into a model that is not sharded, for export."""
    stored = set(names(folder))
    averages = {f"{OPTIMIZER}{name}.{AVERAGE}": parameter.detach() for name, parameter in model.named_parameters()}
    # In one process, whatever the launch.
    _load(folder, _model_tensors(model), World())
    _load(folder, {name: tensor for name, tensor in averages.items() if name in stored}, World())


def names(folder: Path) -> list[str]:
    """Lists the names of a checkpoint's tensors, in their order."""
    index = metadata_of(folder).state_dict_metadata
    return [name for name, facts in index.items() if isinstance(facts, TensorStorageMetadata)]


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Reads one whole tensor of a checkpoint, without its model."""
    facts = metadata_of(folder).state_dict_metadata[name]
    assert isinstance(facts, TensorStorageMetadata)
    tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
    _load(folder, {name: tensor}, World())
    return tensor


def _load(folder: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    # dcp would read it too, but bury the reason of a failure.
    metadata_of(folder)
    with _alone_is_fine():
        dcp.load(tensors, storage_reader=_Reader(folder), process_group=world.control, no_dist=world.size == 1)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Silences dcp's warning that it works for one process only, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = {f"{OPTIMIZER}{name}": tensor for name, tensor in optimizer.tensors().items()}
    return {**_model_tensors(model), **state}


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Selects trained parameters and buffers; frozen parameters are the verifier's and come from there again."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {f"model.{name}": value for name, value in model.state_dict().items() if name not in frozen}


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.json"
