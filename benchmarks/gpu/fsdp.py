"""The part `fsdp`: one update of a model that FSDP2 shards over a world of one, against the same without FSDP2.

torchrun starts the program below. Training itself never shards over one process (training/shard.py), so this calls the
function that it calls over several.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.gpu.built import Trainee, plan_of
from benchmarks.gpu.command import run
from benchmarks.gpu.lines import FAILED, Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from benchmarks.perf.side_by_side import MARK, report
from speculators.training import snapshot
from speculators.training.optimizer import Optimizer
from speculators.training.shard import shard_over
from speculators.training.world import World, leave, repeatable, start, stop

# The sums are the same, and their order may not be: float32 gradients of bf16 products.
TOLERANCE = 1e-3


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each optimizer, from the process that torchrun starts."""
    launch = ["--standalone", "--nproc_per_node=1", "-m", "benchmarks.gpu.fsdp", *(["--small"] if setup.small else [])]
    ended = run("torch.distributed.run", *launch, seconds=setup.left, folder=setup.folder / "fsdp")
    texts = [line.removeprefix(MARK) for line in ended.out.splitlines() if line.startswith(MARK)]
    yield from (VerdictLine(**json.loads(text)) for text in texts)
    if ended.code != 0 or not texts:
        yield VerdictLine(name="torchrun", verdict=FAILED, reason=f"it ended with {ended.code}: {ended.tail}")


def sharded(setup: PartSetup, world: World, optimizer: str) -> Judged:
    """Compares gradients, and reads back the checkpoint of a sharded model and its optimizer."""
    plan = plan_of("quickstart", "smollm2-135m", setup)
    lengths = [30, 20] if setup.small else [1200, 848]
    plain, trainee = (Trainee.of(plan, lengths, 2, setup.device) for _ in range(2))
    with repeatable(enabled=True):
        expected = plain.gradients()
    shard_over(trainee.model, init_device_mesh(setup.device.type, (1,)))
    section = attrs.evolve(plan.recipe.schedule.optimizer, name=optimizer)
    made = Optimizer(trainee.model, section, ema=None)
    trainee.worker = attrs.evolve(trainee.worker, world=world, optimizer=made)
    with repeatable(enabled=True):
        received = {name: _whole(grad) for name, grad in trainee.gradients().items()}
    error = max(float((received[n] - g).norm() / g.norm().clamp_min(1e-9)) for n, g in expected.items())
    norm = trainee.update().grad_norm
    figures = {"backend": world.backend, "relative_error": error, "grad_norm": norm, "same_checkpoint": _kept(trainee)}
    if setup.device.type == "cuda" and "nccl" not in world.backend:
        return figures, f"the process group's backend is {world.backend}, without NCCL"
    faults = {
        f"gradients differ from those without FSDP2 by {error:.3g}": error > TOLERANCE,
        "a checkpoint is read back with other values": not figures["same_checkpoint"],
    }
    return figures, "; ".join(fault for fault, is_so in faults.items() if is_so)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _kept(trainee: Trainee) -> bool:
    """Writes a checkpoint, makes one more update, reads the checkpoint, and compares the weights."""
    model, worker = trainee.model, trainee.worker
    before = {name: _whole(parameter).clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        snapshot.write(Path(folder), model, worker.optimizer, worker.world)
        trainee.update()
        snapshot.read(Path(folder), model, worker.optimizer, worker.world)
    return all(torch.equal(before[name], _whole(parameter)) for name, parameter in model.named_parameters())


def main() -> None:
    """Prints a line for each optimizer; torchrun starts it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    world = start()
    setup = PartSetup(device=world.device, small=options.small, folder=Path())
    for optimizer in ("adamw", "muon"):
        report(attrs.asdict(judged(optimizer, partial(sharded, setup, world, optimizer))))
    stop(world)
    leave(0)


if __name__ == "__main__":
    main()
