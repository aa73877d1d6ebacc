"""Spreads one model over many processes with FSDP2, keeping the arithmetic of a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from speculators.errors import TrainingError
from speculators.training.world import World


class Bf16Sums(DefaultReduceScatter):
    """Adds up the gradients of several processes in bf16: half the bytes of FSDP2's float32.

    FSDP2's own MixedPrecisionPolicy(reduce_dtype=...) would also accumulate the rows of an update in bf16, where later
    rows are lost in the sum of the earlier ones. Here they accumulate in float32, as without this class.

    For each group of parameters, FSDP2 allocates a buffer for this process's gradients, then one for their sums over
    processes. With `over = "node"`, these sums are then added across machines, in bf16 as well.
    """

    def __init__(self) -> None:
        self._is_sums = False

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Makes the next buffer: for gradients in `dtype`, or for their sums in bf16."""
        is_sums, self._is_sums = self._is_sums, not self._is_sums
        return super().allocate(size, dtype=torch.bfloat16 if is_sums else dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> dist.Work:
        """Sums `input_tensor` over the processes; each receives its part in `output_tensor`."""
        return super().__call__(output_tensor, input_tensor.to(output_tensor.dtype), *args, **kwargs)


def shard(model: nn.Module, world: World, *, over: bool | str = True, gradient_precision: str = "fp32") -> None:
    """Shards `model` over the world, in place; does nothing in a world of one.

    Parameters stay float32 and the forward runs under autocast, as in one process, instead of under FSDP2's own
    MixedPrecisionPolicy: that would round norm weights and elementwise work to bf16 in sharded runs only, so that 1
    and N processes would train different models. The price, a float32 all-gather, is paid once per update (see
    `gathered_once`).

    Frozen parameters stay whole on every process: they need neither gradients nor optimizer state, and a sharded
    frozen embedding would have to be gathered for every update.

    Args:
        model: has `layers`, an nn.ModuleList; each entry is sharded by itself, then the rest.
        over: True for all processes; "node" for those of each machine, so that only gradients travel between machines;
            False for none: every process keeps a copy.
        gradient_precision: "fp32" or "bf16", in which the gradients of several processes are added up.

    Raises:
        TrainingError: the processes did not build the same model, or machines differ in their number of processes.
    """
    if world.size == 1:
        return
    _check_same(model, world)
    shard_over(model, _mesh(world, over), gradient_precision=gradient_precision)


def _mesh(world: World, over: bool | str) -> DeviceMesh:
    """Arranges the processes: one dimension of shards or, where copies are kept, copies x shards."""
    if over == "node" and len(sizes := set(world.gather(world.local_size))) > 1:
        message = f'distributed.shard = "node": the machines have {" and ".join(map(str, sorted(sizes)))} processes'
        raise TrainingError(message, hint="start as many on each (--nproc_per_node), or set distributed.shard = true")
    shards = world.local_size if over == "node" else world.size if over else 1
    if shards == world.size:
        return init_device_mesh(world.device.type, (shards,))
    # Ranks of one machine follow each other, so a row of this mesh is a machine.
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard_over(model: nn.Module, mesh: DeviceMesh, *, gradient_precision: str = "fp32") -> None:
    """Shards each entry of `model.layers` over a mesh, then the rest; over a mesh of one process it has no effect."""
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for layer in layers_of(model):
        # A layer runs once for each unrolled draft step: gathering it each time would cost more than its memory.
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    if gradient_precision == "bf16":
        for part in _parts(model):
            part.set_custom_reduce_scatter(Bf16Sums())


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Iterates over the modules in `model.layers`, the contract's name for them."""
    return iter(model.get_submodule("layers").children())


@contextmanager
def gathered_once(model: nn.Module) -> Iterator[None]:
    """Gathers parameters once, at their first use in the block; at its end, frees them and adds up the gradients once.

    By itself, FSDP2 does so at each use of a layer in a backward: once per unrolled draft step.
    """
    _each_backward(model, is_whole=False)
    yield
    _each_backward(model, is_whole=True)
    if isinstance(model, FSDPModule):
        # FSDP2 calls this at the end of every backward; here it runs once, when all gradients are there.
        model._get_fsdp_state()._root_post_backward_final_callback()


def _each_backward(model: nn.Module, *, is_whole: bool) -> None:
    """Decides whether gradients are added up, and parameters freed, after a layer's backward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_whole)
        model.set_reshard_after_backward(is_whole)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gathers the whole parameters on every process as plain tensors, for code that does not call `forward`."""
    parts = _parts(model)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    """Lists the modules that are gathered one at a time; empty before `shard`."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


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
