"""`estimate`: everything that `spec plan` shows about costs, from counts, devices and earlier runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from speculators.cost.catalogue import Device
from speculators.cost.costs import GPUS_PER_NODE, Costs
from speculators.cost.devices import EFFICIENCY, memory, seconds, verifier_alone, warnings
from speculators.cost.history import StageTime, measured_times
from speculators.cost.sizes import costs_of
from speculators.files.disk import free_bytes
from speculators.recipe.plan import Plan
from speculators.runs.places import Places
from speculators.training.world import local_device

THIS_MACHINE = "this machine"


@attrs.frozen(kw_only=True)
class DeviceEstimate:
    """A plan's needs on some devices, per process.

    Attributes:
        device: the device of the estimate.
        memory: bytes while training, by part.
        memory_verifier: bytes of a process that captures or measures, with the verifier or its part of it; 0 where
            a server does all that.
        communication: bytes received per update, by kind of data.
        reading: bytes of cached states that one update reads, over all processes.
        times: of each stage, as far as they can be estimated.
    """

    device: Device
    memory: Mapping[str, int]
    memory_verifier: int
    communication: Mapping[str, int]
    reading: int
    times: Mapping[str, StageTime]

    @property
    def memory_total(self) -> int:
        """Bytes of one process while it trains."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """Turns the estimate into JSON values."""
        return {
            "device": self.device.name,
            "processes": self.device.count,
            "capacity": self.device.memory_bytes,
            "memory": dict(self.memory),
            "memory_total": self.memory_total,
            "memory_verifier": self.memory_verifier,
            "communication": dict(self.communication),
            "reading": self.reading,
            "seconds": {stage: time.to_json() for stage, time in self.times.items()},
        }


@attrs.frozen(kw_only=True)
class Estimate:
    """The costs of a plan.

    Attributes:
        costs: that do not depend on a device beyond its type.
        devices: one entry for each kind of device; at least one.
        notes: how the figures are to be read.
        warnings: what should be changed, or known, before the plan is run.
    """

    costs: Costs
    devices: tuple[DeviceEstimate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Turns the estimate into JSON values."""
        return {
            **self.costs.to_dict(),
            "devices": [device.to_json() for device in self.devices],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def estimate(
    plan: Plan,
    places: Places,
    *,
    devices: Sequence[Device] = (),
    processes: int = 1,
    efficiency: float | None = None,
    conversations: int | None = None,
    mean_tokens: int | None = None,
) -> Estimate:
    """Estimates the costs of a plan.

    Args:
        devices: empty for this machine.
        processes: on this machine.
        efficiency: share of the devices' peak that is reached; None for a guess.
        conversations, mean_tokens: of data that is not prepared yet; None takes the most that the recipe allows.

    Raises:
        VerifierError: the verifier's architecture cannot be built.
        Exception: whatever a plug-in raises where it is built or run without values.
    """
    used = list(devices) or [_this_machine(processes)]
    # This machine, or devices of the catalogue, which are of one kind.
    costs = costs_of(plan, places, kind=used[0].kind, conversations=conversations, mean_tokens=mean_tokens)
    share = efficiency or EFFICIENCY
    ignored = {"--conversations": conversations, "--mean-tokens": mean_tokens} if costs.amount.counted else {}
    names = [name for name, value in ignored.items() if value is not None]
    unused = [f"{' and '.join(names)} ignored: the data is already prepared and counted"] if names else []
    free_disk = None if devices else free_bytes(places.cache)
    notes = _notes(costs)
    if plan.recipe.distributed.shard == "node" and any(device.count > GPUS_PER_NODE for device in devices):
        notes.append(f'distributed.shard = "node": {GPUS_PER_NODE} GPUs per machine are assumed')
    if devices:
        origin = "as requested" if efficiency else "a guess, not measured"
        notes.append(f"GPU times assume {share:g} of the dense peak in the data sheet ({origin})")
    return Estimate(
        costs=costs,
        devices=tuple(_on_device(costs, device, _times(costs, places, device, share)) for device in used),
        notes=tuple(notes),
        warnings=(*unused, *warnings(costs, used, free_disk=free_disk)),
    )


def _on_device(costs: Costs, device: Device, times: Mapping[str, StageTime]) -> DeviceEstimate:
    return DeviceEstimate(
        device=device,
        memory=memory(costs, device),
        memory_verifier=verifier_alone(costs, device),
        communication=costs.communication(device.count),
        reading=costs.reading(costs.plan.recipe.schedule.tokens_per_step),
        times=times,
    )


def _this_machine(processes: int) -> Device:
    """Describes this machine: its GPUs, or its cores and the memory that the processes share."""
    if local_device().type == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        return Device(name=THIS_MACHINE, count=processes, memory_bytes=memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(name=THIS_MACHINE, count=processes, kind="cpu", memory_bytes=memory / processes)


def _times(costs: Costs, places: Places, device: Device, share: float) -> dict[str, StageTime]:
    if device.name == THIS_MACHINE:
        return measured_times(costs, places)
    times = seconds(costs, device, share)
    return {stage: StageTime(seconds=time, how="at peak x share") for stage, time in times.items() if time is not None}


def _notes(costs: Costs) -> list[str]:
    notes = [
        "FLOPs count matrix products only; memory counts tensors only, in units of 1000, without Python, libraries, "
        "the allocator's cache and the logits of a benchmark"
    ]
    if not costs.amount.counted:
        full = f"{costs.mean_tokens:,} tokens each"
        notes.append(f"the data is not prepared: figures marked <= assume {full} for all conversations, all supervised")
    return notes
