"""Devices and launches: what a plan's costs mean for memory and time, and how they grow with the nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import attrs

from speculators.cost.costs import MUCH_DISK, Costs, size_text
from speculators.errors import Problem, RecipeError
from speculators.registry import near_miss
from speculators.verifier.capture import CAPTURE_TOKENS

# Dense peaks of the vendors' data sheets (SXM where there are several): memory in GB, TFLOP/s in bf16 and in float32.
PEAKS: dict[str, tuple[int, float, float]] = {
    "A100": (80, 312, 19.5),
    "H100": (80, 989, 67),
    "H200": (141, 989, 67),
    "B200": (180, 2250, 75),
    "L4": (24, 121, 30.3),
    "L40S": (48, 362, 91.6),
    "MI300X": (192, 1307, 163.4),
    "RTX4090": (24, 165, 82.6),
}
# Of a device's peak; a guess that is told wherever it is used.
EFFICIENCY = 0.35


@attrs.frozen(kw_only=True)
class Device:
    """A number of equal devices, one process each.

    Attributes:
        name: as it was asked for, with the number.
        kind: "cuda" or "cpu".
        memory_bytes: of one; None where it is not known.
        peaks: operations a second of one by precision; empty where they are not known.
    """

    name: str
    count: int
    kind: str = "cuda"
    memory_bytes: float | None = None
    peaks: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Bandwidths:
    """Bytes a second.

    Attributes:
        link: of one process to others of its node, each way.
        network: of one process to other nodes.
        storage: of all nodes together, where the states are read from.
    """

    link: float = 400e9
    network: float = 50e9
    storage: float = 20e9


def parse_devices(text: str) -> list[Device]:
    """Returns the devices of a list such as "8xH100-80GB,1xL40S"; memory is the usual one where it is not given.

    Raises:
        RecipeError: says which part is not understood.
    """
    return [_device(part.strip()) for part in text.split(",")]


def _device(text: str) -> Device:
    found = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9]+)(?:-(\d+)GB)?", text)
    count, name, memory = found.groups() if found else (None, "", None)
    if not found or 0 in (int(count or 1), int(memory or 1)):
        raise RecipeError([Problem("--gpus", f"must be like 8xH100-80GB, numbers from 1, got {text!r}")])
    if name.upper() not in PEAKS:
        hint = near_miss(name.upper(), list(PEAKS)) or f"there are: {', '.join(PEAKS)}"
        raise RecipeError([Problem("--gpus", f"no figures for a device {name!r}", hint)])
    usual, bf16, fp32 = PEAKS[name.upper()]
    return Device(
        name=text,
        count=int(count or 1),
        memory_bytes=float(memory or usual) * 1e9,
        peaks={"bf16": bf16 * 1e12, "fp32": fp32 * 1e12},
    )


def parse_bandwidths(text: str) -> Bandwidths:
    """Returns the bandwidths of "LINK,NETWORK,STORAGE" in GB/s; raises RecipeError."""
    try:
        link, network, storage = (float(part) * 1e9 for part in text.split(","))
        if not all(0 < each < math.inf for each in (link, network, storage)):
            raise ValueError
    except ValueError:
        message = f"must be three finite numbers > 0, LINK,NETWORK,STORAGE in GB/s, got {text!r}"
        raise RecipeError([Problem("--bandwidths", message)]) from None
    return Bandwidths(link=link, network=network, storage=storage)


def memory(costs: Costs, device: Device) -> dict[str, int]:
    """Returns the bytes of one process on this device while it trains, by part."""
    tokens = CAPTURE_TOKENS[device.kind]
    return costs.memory(device.count, capture_tokens=tokens, rows_on_host=device.kind != "cpu")


def verifier_alone(costs: Costs, device: Device) -> int:
    """Returns the bytes of the one process that captures or measures on this device: the verifier, whole."""
    return costs.verifier_memory(costs.plan.recipe.verifier.dtype, CAPTURE_TOKENS[device.kind])


def seconds(costs: Costs, device: Device, efficiency: float) -> dict[str, float | None]:
    """Returns the time of each stage whose operations are known, at a share of the peak."""
    speed = device.peaks[costs.plan.precision] * efficiency
    return {stage: None if flops is None else flops / speed for stage, flops in costs.flops(device.count).items()}


def told(costs: Costs, device: Device) -> dict[str, Any]:
    """Returns what the plan needs on a device, as JSON values."""
    parts = memory(costs, device)
    return {
        "device": device.name,
        "processes": device.count,
        "capacity": device.memory_bytes,
        "memory": parts,
        "memory_total": sum(parts.values()),
        "memory_verifier": verifier_alone(costs, device),
        "communication": costs.communication(device.count),
        "reading": costs.reading(costs.plan.recipe.schedule.tokens_per_step),
    }


def simulate(
    costs: Costs, device: Device, nodes: int, bandwidths: Bandwidths, efficiency: float
) -> list[dict[str, Any]]:
    """Returns one update's time by the number of nodes: 1, 2, 4 and so on, and `nodes`.

    Rows are read while the step before computes; communication is added whole, though part of it overlaps. Where a
    step has no row for each process, it is made larger, which is another recipe: `grown` says so.
    """
    counts = sorted({1 << power for power in range(nodes.bit_length()) if 1 << power <= nodes} | {nodes})
    return [_at(costs, device, count, bandwidths, efficiency) for count in counts]


def _at(costs: Costs, device: Device, nodes: int, bandwidths: Bandwidths, efficiency: float) -> dict[str, Any]:
    plan, world = costs.plan, nodes * device.count
    rows = -(-plan.rows_per_step // world)
    tokens = rows * world * plan.row_tokens
    online = 0 if costs.cached else plan.row_tokens * costs.verifier.flops(costs.mean_tokens)
    speed = device.peaks[plan.precision] * efficiency
    compute = (rows * (costs.row.row_flops + online) + costs.row.update_flops) / speed
    moved = sum(costs.communication(world).values())
    communication = moved / (bandwidths.link if nodes == 1 else bandwidths.network)
    reading = costs.reading(tokens) / bandwidths.storage
    step = max(compute, reading) + communication
    return {
        "nodes": nodes,
        "processes": world,
        "rows": rows,
        "tokens_per_step": tokens,
        "grown": tokens > plan.recipe.schedule.tokens_per_step,
        "compute_seconds": compute,
        "communication_seconds": communication,
        "reading_seconds": reading,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
    }


def warnings(costs: Costs, devices: list[Device], *, free_disk: float | None) -> list[str]:
    """Returns what should be known before anything is paid for."""
    found = [*_disk_warnings(costs, free_disk), *_data_warnings(costs, devices)]
    for device in devices:
        found += _memory_warnings(costs, device)
    return found


def _disk_warnings(costs: Costs, free_disk: float | None) -> list[str]:
    states = costs.states_bytes
    if not costs.cached or states is None:
        return []
    size = size_text(states) if costs.amount.counted else f"up to {size_text(states)}"
    if free_disk is not None and states > free_disk:
        return [f"cached states would need {size}, and {size_text(free_disk)} are free here; online needs 0"]
    return [f"cached states would need {size}; online needs 0"] if states > MUCH_DISK else []


def _data_warnings(costs: Costs, devices: list[Device]) -> list[str]:
    recipe, found = costs.plan.recipe, []
    if costs.amount.tokens is None:
        found.append("nobody knows how much data this is before it is read: --conversations N gives the figures")
    if recipe.data.regenerate is not None and any(device.count > 1 for device in devices):
        found.append("the answers are written by one process; the others wait: regenerate the data beforehand")
    if not costs.cached and recipe.data.states_dtype != recipe.verifier.dtype and recipe.benchmark.suites:
        kinds = f"{recipe.verifier.dtype} to evaluate, {recipe.data.states_dtype} for states"
        found.append(f"the first process holds the verifier twice ({kinds}): give both the same dtype")
    if costs.amount.updates is not None and costs.amount.updates < 20:
        found.append(f"only {costs.amount.updates} updates: a smaller schedule.tokens_per_step makes more of the data")
    return found


def _memory_warnings(costs: Costs, device: Device) -> list[str]:
    if device.memory_bytes is None:
        return []
    parts, room = memory(costs, device), size_text(device.memory_bytes)
    found = []
    if (total := sum(parts.values())) > device.memory_bytes:
        largest = max(parts, key=lambda part: parts[part])
        cure = {
            "activations": "lower schedule.row_tokens",
            "chunk buffers": "set algorithm.draft_vocab_size",
            "verifier": 'set data.hidden_states = "cached"',
            "rows": "lower schedule.tokens_per_step, or take more processes",
        }.get(largest, "take more processes, or a smaller draft model")
        need = f"training needs {size_text(total)} a process of {room}"
        found.append(f"{device.name}: {need}; most of it is {largest}: {cure}")
    recipe = costs.plan.recipe
    alone = verifier_alone(costs, device)
    held = "measured" if recipe.data.served else "captured or measured"
    if alone > device.memory_bytes and (recipe.benchmark.suites or not recipe.data.served):
        need = f"the verifier alone needs {size_text(alone)} a process of {room}"
        found.append(f"{device.name}: {need}, and one process holds it whole: it cannot be {held} here")
    return found
