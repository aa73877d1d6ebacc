"""Spreads one model over many processes with FSDP2, keeping the arithmetic of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from speculators.errors import TrainingError
from speculators.training.world import World


def shard(model: nn.Module, world: World, *, enabled: bool = True) -> None:
    """Shards `model` over the world, in place; does nothing in a world of one.

    Parameters stay float32 and the forward runs under autocast, as in one process, instead of under FSDP2's own
    MixedPrecisionPolicy: that would round norm weights and elementwise work to bf16 in sharded runs only, so that 1
    and N processes would train different models. The price, a float32 all-gather, is paid once per update (see
    `gather_once`).

    Frozen parameters stay whole on every process: they need neither gradients nor optimizer state, and a sharded
    frozen embedding would have to be gathered for every update.

    Args:
        model: has `layers`, an nn.ModuleList; each entry is sharded by itself, then the rest.
        enabled: if False, every process keeps a copy, and only gradients are exchanged.

    Raises:
        TrainingError: the processes did not build the same model.
    """
    if world.size == 1:
        return
    _check_same(model, world)
    if enabled:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        mesh = init_device_mesh(world.device.type, (world.size, 1), mesh_dim_names=("replicate", "shard"))
    shard_over(model, mesh)


def shard_over(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards each entry of `model.layers` over a mesh, then the rest; a mesh of one process shards without effect."""
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for layer in layers_of(model):
        # A layer runs once for each unrolled draft step: gathering it each time would cost more than its memory.
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Iterates over the modules in `model.layers`, the contract's name for them."""
    return iter(model.get_submodule("layers").children())


def gather_once(model: nn.Module, *, last: bool) -> None:
    """Keeps parameters gathered and gradients unreduced between the rows of an update, until the `last` row."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gathers the whole parameters on every process as plain tensors, for code that does not call `forward`."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def _check_same(model: nn.Module, world: World) -> None:
    """Raises TrainingError unless every process has the same values: otherwise shards of different models would mix."""
    sums = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    by_rank = world.gather(sums)
    different = sorted(name for name in sums if len({repr(theirs.get(name)) for theirs in by_rank}) > 1)
    if different:
        raise TrainingError(
            f"the processes built different models: {', '.join(different[:5])}",
            hint="give every process the same seed before the model is built",
        )


def precision(world: World, name: str) -> torch.autocast:
    """Returns the context of a forward: autocast to bf16 over float32 parameters, or float32 throughout.

    Args:
        name: "bf16" or "fp32", which the plan has adjusted to the device.
    """
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=name == "bf16")
