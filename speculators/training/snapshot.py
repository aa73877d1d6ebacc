"""What a checkpoint holds, written and read by torch.distributed.checkpoint, for any number of processes."""

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
from speculators.training.optimizer import Optimizer
from speculators.training.world import World

# torch keeps what a checkpoint holds in a pickle, and a pickle can run any program when it is read. These are what is
# in one of ours. BytesStorageMetadata is not: torch opens what it tells of as a pickle, too.
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


class _Unpickler(pickle.Unpickler):
    """Reads the classes above, and dtypes, and refuses all else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is in no checkpoint of ours")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, with metadata that are read as above."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = metadata_of(Path(self.path))
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        return found


def metadata_of(folder: Path) -> Metadata:
    """Returns which tensors a checkpoint holds.

    Raises:
        ArtifactError: it is damaged, or not one that this package wrote.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
    # What damaged bytes lead to inside pickle can be anything.
    except Exception as error:
        hint = "it is not opened: a pickle can run any program; take the checkpoint from who trained it, or remove it"
        raise ArtifactError(f"{folder / METADATA}: not a checkpoint of ours: {error}", hint=hint) from error
    if not (isinstance(found, Metadata) and found.storage_meta is not None):
        raise ArtifactError(f"{folder / METADATA}: not a checkpoint of ours: it is a {type(found).__name__}")
    return found


def write(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Writes model, optimizer and this process's random number generators into `folder`; every process calls it.

    Raises:
        OSError, RuntimeError: of the process where it happened; dcp's CheckpointException on all, if while in dcp.
    """
    with _alone_is_fine():
        dcp.save(
            _tensors(model, optimizer),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            no_dist=world.size == 1,
        )
    (folder / _rng_file(world.rank)).write_text(json.dumps(rng.capture()), encoding="utf-8")


def read(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Reads model and optimizer back, in place, sharded as they are now; raises ArtifactError as `metadata_of`."""
    optimizer.prime()
    _load(folder, _tensors(model, optimizer), world)


def read_rng(folder: Path, world: World) -> None:
    """Reads this process's random number generators back."""
    rng.restore(json.loads((folder / _rng_file(world.rank)).read_text(encoding="utf-8")))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads only the weights of a checkpoint into a model that is not sharded, in one process, for export."""
    _load(folder, _model_tensors(model), World())


def names(folder: Path) -> list[str]:
    """Returns the names of a checkpoint's tensors, in their order."""
    held = metadata_of(folder).state_dict_metadata
    return [name for name, facts in held.items() if isinstance(facts, TensorStorageMetadata)]


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Reads one tensor of a checkpoint, whole, without the model that it is of."""
    facts = metadata_of(folder).state_dict_metadata[name]
    assert isinstance(facts, TensorStorageMetadata)
    tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
    _load(folder, {name: tensor}, World())
    return tensor


def _load(folder: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    # Before dcp does, which would bury the reason.
    metadata_of(folder)
    with _alone_is_fine():
        dcp.load(tensors, storage_reader=_Reader(folder), no_dist=world.size == 1)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Silences dcp's warning that it works for one process, which is what it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = {f"optimizer.{name}": tensor for name, tensor in optimizer.tensors().items()}
    return {**_model_tensors(model), **state}


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns trained parameters and buffers; frozen parameters are the verifier's and are built anew from it."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {f"model.{name}": value for name, value in model.state_dict().items() if name not in frozen}


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.json"
