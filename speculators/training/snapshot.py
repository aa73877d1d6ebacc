"""What a checkpoint holds, written and read by torch.distributed.checkpoint, for any number of processes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from speculators.training import rng
from speculators.training.optimizer import Optimizer
from speculators.training.world import World


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
    """Reads model and optimizer back, in place, sharded as they are now."""
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
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return [name for name, facts in held.items() if isinstance(facts, TensorStorageMetadata)]


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Reads one tensor of a checkpoint, whole, without the model that it is of."""
    facts = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata[name]
    assert isinstance(facts, TensorStorageMetadata)
    tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
    _load(folder, {name: tensor}, World())
    return tensor


def _load(folder: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    with _alone_is_fine():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=world.size == 1)


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
