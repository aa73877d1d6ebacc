"""`estimate`: all that `spec plan` tells of a plan's costs, put together from counts, devices and earlier runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.cost.costs import Costs, size_text
from speculators.cost.devices import EFFICIENCY, Bandwidths, Device, seconds, simulate, told, warnings
from speculators.cost.history import measured
from speculators.cost.sizes import Expected, costs_of
from speculators.recipe.plan import Plan
from speculators.runs.places import Places
from speculators.training.world import local_device

HERE = "this machine"


@attrs.frozen(kw_only=True)
class Wanted:
    """What is asked of an estimate.

    Attributes:
        devices: none for this machine.
        processes: on this machine.
        efficiency: share of the devices' peak; None for the guess.
        conversations, mean_tokens: of data that is not prepared; None takes what the recipe bounds.
        nodes: simulate up to so many; None for no simulation.
        bandwidths: of the simulation; None for the usual ones.
    """

    devices: Sequence[Device] = ()
    processes: int = 1
    efficiency: float | None = None
    conversations: int | None = None
    mean_tokens: int | None = None
    nodes: int | None = None
    bandwidths: Bandwidths | None = None


def estimate(plan: Plan, places: Places, wanted: Wanted) -> dict[str, Any]:
    """Returns the costs of a plan as JSON values.

    Raises:
        VerifierError: the verifier's architecture cannot be built.
        Exception: whatever a plug-in raises where it is built or run without values.
    """
    expected = Expected(conversations=wanted.conversations, mean_tokens=wanted.mean_tokens)
    costs = costs_of(plan, places, expected)
    devices = list(wanted.devices) or [_here(wanted.processes)]
    share = wanted.efficiency or EFFICIENCY
    result = {
        **costs.to_dict(),
        "devices": [{**told(costs, device), "seconds": _times(costs, places, device, share)} for device in devices],
        "notes": _notes(costs, wanted, share),
        "warnings": [
            *_unused(costs, wanted),
            *warnings(costs, devices, free_disk=None if wanted.devices else _free(places.cache)),
        ],
    }
    if wanted.nodes is not None:
        result["simulation"] = _simulation(costs, devices[0], wanted, share)
    return result


def _here(processes: int) -> Device:
    """Returns this machine: its GPUs, or its cores and the memory that the processes share."""
    if local_device().type == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        return Device(name=HERE, count=processes, memory_bytes=memory)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(name=HERE, count=processes, kind="cpu", memory_bytes=memory / processes)


def _times(costs: Costs, places: Places, device: Device, share: float) -> dict[str, dict[str, Any]]:
    if device.name == HERE:
        return {stage: attrs.asdict(time) for stage, time in measured(costs, places).items()}
    times = seconds(costs, device, share)
    return {stage: {"seconds": time, "how": "at peak x share"} for stage, time in times.items() if time is not None}


def _notes(costs: Costs, wanted: Wanted, share: float) -> list[str]:
    notes = [
        "FLOPs are those of products; memory is that of tensors, in units of 1000: Python, libraries, what an "
        "allocator keeps and the logits of a benchmark come on top"
    ]
    if not costs.amount.counted:
        full = f"{costs.mean_tokens:,} tokens each"
        notes.append(f"the data is not prepared: figures marked <= take every conversation for {full}, all supervised")
    if wanted.devices:
        what = "as asked" if wanted.efficiency else "a guess, not measured"
        notes.append(f"times of GPUs are their data sheet's dense peak times {share:g} ({what})")
    return notes


def _unused(costs: Costs, wanted: Wanted) -> list[str]:
    given = {"--conversations": wanted.conversations, "--mean-tokens": wanted.mean_tokens}
    names = [name for name, value in given.items() if value is not None]
    if not names or not costs.amount.counted:
        return []
    return [f"{' and '.join(names)} not used: the data is prepared, and its own figures are told"]


def _simulation(costs: Costs, device: Device, wanted: Wanted, share: float) -> dict[str, Any]:
    assert wanted.nodes is not None
    bandwidths = wanted.bandwidths or Bandwidths()
    stated = ", ".join(f"{name} {size_text(value)}/s" for name, value in attrs.asdict(bandwidths).items())
    rows = simulate(costs, device, wanted.nodes, bandwidths, share)
    which = f"{device.name}, the first of --gpus," if len(wanted.devices) > 1 else device.name
    notes = [f"simulated: nodes of {which} with {stated}; communication is not overlapped, reading is"]
    if any(row["grown"] for row in rows):
        step = costs.plan.recipe.schedule.tokens_per_step
        notes.append(f"* an update of {step:,} tokens has no row for each process: it is made larger, another recipe")
    stated_as = attrs.asdict(bandwidths)
    return {"device": device.name, "rows": rows, "notes": notes, "bandwidths": stated_as, "efficiency": share}


def _free(folder: Path) -> float:
    """Returns the bytes that are free where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(there).free)
