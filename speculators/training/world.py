"""The processes of one launch: rank and device of this one, and the collectives that all take part in."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
import torch.distributed as dist

from speculators.errors import TrainingError
from speculators.training.rendezvous import fresh_store

# Ranks reach a collective of tensors at nearly the same time: a longer wait means that one of them hangs.
DATA_PATIENCE = timedelta(minutes=15)
# Meanwhile rank 0 alone may have a verifier answer every prompt, tokenize a million conversations, or measure.
CONTROL_PATIENCE = timedelta(days=30)

# CUDA's libraries read these once, at their first use. cuBLAS needs a workspace of a fixed size to repeat its sums.
# NCCL's NVLS lets the switch sum, in an order that NVIDIA does not promise to be the same each time.
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
# Settings of torch's allocator, by its present name and its former one.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# Options of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


@attrs.frozen(kw_only=True)
class World:
    """One process among the `size` of a launch.

    Attributes:
        rank: number of this process in the launch, from 0; those of one machine follow each other.
        local_size: processes of this machine.
        backend: of the process group; "" if there is none.
        control: the group in which processes wait for serial work and exchange host values; None if there is none.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    backend: str = ""
    control: dist.ProcessGroup | None = attrs.field(default=None, repr=False)

    @property
    def device_name(self) -> str:
        """The processor, and on CUDA the GPU and CUDA's version."""
        names = [_processor_name()]
        if self.device.type == "cuda":
            names += [torch.cuda.get_device_name(self.device), f"CUDA {torch.version.cuda}"]
        return ", ".join(names)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every process."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Sends rank 0's `value` (anything that pickles) to every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collects every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=self.control)
        return boxes

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over all ranks, in place, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def _processor_name() -> str:
    # Linux names the processor only in a file, other systems through `platform`.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next use; does nothing with other C libraries.

    Each update on a CPU allocates and frees the same gigabytes. By default, large blocks go back to the system at once,
    and the kernel clears every page again: an eighth of an update's time (benchmarks/RESULTS.md).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        libc.mallopt(option, value)


@contextmanager
def repeatable(*, enabled: bool) -> Iterator[None]:
    """Makes CUDA sum in one order while the block runs, where `enabled`: flash attention's backward, for one, does not.

    An operation without such an order raises RuntimeError, if torch knows: it does not check compiled kernels, such as
    those of nn/flex.py. On a CPU, sums have one order anyway.
    """
    # torch sets this attribute by a class of modules that its types do not know.
    options: Any = torch.utils.deterministic
    strict, fill = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    if enabled:
        torch.use_deterministic_algorithms(True)
        # Filling it would cost time, and nothing reads memory before it is written.
        options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        options.fill_uninitialized_memory = fill


def check_gpus(processes: int, *, option: str) -> None:
    """Checks that each process of this machine has a GPU of its own, on a machine that has any.

    Args:
        option: the launcher's option for the number of processes, up to the number.

    Raises:
        TrainingError: there are more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        message = f"{processes} processes on this machine, and it has {gpus} GPU{'s' * (gpus > 1)}"
        raise TrainingError(message, hint=f"{option}{gpus}, or CUDA_VISIBLE_DEVICES= to compute on the CPU")


def unused_gpus(world: World) -> list[str]:
    """Lists what a launch leaves unused of this machine's GPUs, each with the setting that uses it."""
    if world.device.type != "cuda":
        return []
    notes, gpus = [], torch.cuda.device_count()
    if world.size == 1 and gpus > 1:
        notes.append(f"one of {gpus} GPUs is used: --nproc {gpus} uses all")
    if not any("expandable_segments" in os.environ.get(name, "") for name in _ALLOCATOR):
        cure = f"export {_ALLOCATOR[0]}=expandable_segments:True"
        notes.append(f"rows differ in length, so the allocator may waste GPU memory between its blocks: {cure}")
    return notes


def local_device() -> torch.device:
    """Chooses the device that this process computes on: its GPU of the launch, or the CPU of a machine without any."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start() -> World:
    """Joins the launch that torchrun's environment describes; without one, the world is this process alone.

    Returns:
        The world, with a process group for tensors (gloo on CPU; NCCL on CUDA, with gloo beside it for host values) and
        one for control (gloo), if torchrun started this process.

    Raises:
        TrainingError: the launch has more processes on this machine than the machine has GPUs.
    """
    device = local_device()
    cuda = device.type == "cuda"
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda:
        check_gpus(local_size, option="--nproc_per_node=")
        for name, value in _REPEATABLE.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "RANK" not in os.environ:
        return World(device=device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        store = fresh_store(rank, DATA_PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DATA_PATIENCE)
    control = dist.new_group(backend="gloo", timeout=CONTROL_PATIENCE)
    assert isinstance(control, dist.ProcessGroup), "every process is a member of a group of all"
    return World(rank=rank, size=size, local_size=local_size, device=device, backend=backend, control=control)


def stop(world: World) -> None:
    """Leaves the launch."""
    if world.backend and dist.is_initialized():
        # Sharded models keep process groups alive in reference cycles, which must go before the groups do.
        gc.collect()
        dist.destroy_process_group()


def dismiss(world: World) -> World:
    """Lets every process but rank 0 end while rank 0 works on, alone; every process calls this.

    Returns:
        A world of this process alone. On several machines the world as it is: torchrun ends a machine's agent five
        minutes after its processes, and one of the agents keeps the others together.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return world
    world.barrier()
    stop(world)
    return World(rank=world.rank, device=world.device)


def leave(code: int) -> NoReturn:
    """Ends a process of a launch, after `stop`, without the interpreter's teardown.

    With torch 2.13 and gloo, 2 of 18 launches on two cores aborted after all their work was written ("terminate called
    without an active exception"), which made a finished run look like a failed one. The cause is not known; a thread
    that outlives the interpreter is a guess.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
