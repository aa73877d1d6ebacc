"""What a plan costs on a device: memory, time, and the warnings that follow."""

from __future__ import annotations

from collections.abc import Sequence

from speculators.chunks import CHUNKS
from speculators.cost.catalogue import Device
from speculators.cost.costs import MUCH_DISK, Costs
from speculators.files.disk import size_text

# Share of a device's peak that is reached; a guess, and reported as one wherever it is used.
EFFICIENCY = 0.35


def memory(costs: Costs, device: Device) -> dict[str, int]:
    """Counts the bytes of one process on this device while it trains, by part."""
    tokens = CHUNKS[device.kind].capture_tokens
    return costs.memory(device.count, capture_tokens=tokens, rows_on_host=device.kind != "cpu")


def verifier_alone(costs: Costs, device: Device) -> int:
    """Counts the bytes of a process that answers, captures or measures, with the verifier or its part; 0 where servers
    do all that."""
    recipe = costs.plan.recipe
    if not recipe.loads_verifier:
        return 0
    return costs.verifier_memory(recipe.verifier.dtype, CHUNKS[device.kind].capture_tokens, device.count)


def seconds(costs: Costs, device: Device, efficiency: float) -> dict[str, float | None]:
    """Computes the seconds of each stage whose operations are known, at a share of the peak."""
    speed = device.peaks[costs.plan.precision] * efficiency
    return {stage: None if flops is None else flops / speed for stage, flops in costs.flops(device.count).items()}


def warnings(costs: Costs, devices: Sequence[Device], *, free_disk: float | None) -> list[str]:
    """Lists problems that the user should know before paying for anything."""
    messages = [*_disk_warnings(costs, free_disk), *_data_warnings(costs, devices)]
    for device in devices:
        messages += _memory_warnings(costs, device)
    return messages


def _disk_warnings(costs: Costs, free_disk: float | None) -> list[str]:
    states = costs.states_bytes
    if not costs.captures or states is None:
        return []
    size = size_text(states) if costs.amount.counted else f"up to {size_text(states)}"
    if free_disk is not None and states > free_disk:
        return [f"cached states would need {size}, but only {size_text(free_disk)} are free here; online needs 0"]
    return [f"cached states would need {size}; online needs 0"] if states > MUCH_DISK else []


def _data_warnings(costs: Costs, devices: Sequence[Device]) -> list[str]:
    recipe, messages = costs.plan.recipe, []
    if costs.amount.tokens is None:
        messages.append("the amount of data is unknown until it is read: --conversations N estimates with that many")
    if recipe.data.regenerate is not None and any(device.count > 1 for device in devices):
        messages.append("one process writes the answers while the others wait: regenerate the data beforehand")
    if costs.online and recipe.data.capture_dtype != recipe.verifier.dtype and recipe.benchmark.suites:
        kinds = f"{recipe.verifier.dtype} to evaluate, {recipe.data.capture_dtype} for states"
        messages.append(f"the first process keeps the verifier in memory twice ({kinds}): give both the same dtype")
    if costs.amount.updates is not None and costs.amount.updates < 20:
        hint = "a smaller schedule.tokens_per_step makes more updates from the same data"
        messages.append(f"only {costs.amount.updates} updates: {hint}")
    return messages


def _memory_warnings(costs: Costs, device: Device) -> list[str]:
    if device.memory_bytes is None:
        return []
    parts, capacity = memory(costs, device), size_text(device.memory_bytes)
    messages = []
    if (total := sum(parts.values())) > device.memory_bytes:
        largest = max(parts, key=lambda part: parts[part])
        cure = {
            "activations": "lower schedule.row_tokens",
            "chunk buffers": "set algorithm.draft_vocab_size",
            "verifier": 'set data.hidden_states = "cached"',
            "rows": "lower schedule.tokens_per_step, or take more processes",
        }.get(largest, "take more processes, or a smaller draft model")
        need = f"training needs {size_text(total)} per process, a device has {capacity}"
        messages.append(f"{device.name}: {need}; the largest part is {largest}: {cure}")
    return [*messages, *_verifier_warnings(costs, device)]


def _verifier_warnings(costs: Costs, device: Device) -> list[str]:
    """Reports a verifier that does not fit beside nothing else, with the settings that need less of it."""
    recipe, alone = costs.plan.recipe, verifier_alone(costs, device)
    if device.memory_bytes is None or alone <= device.memory_bytes:
        return []
    need = f"the verifier alone needs {size_text(alone)}, a device has {size_text(device.memory_bytes)}"
    if recipe.distributed.shard_verifier and device.count > 1:
        return [f"{device.name}: {need}: take more processes, which share it"]
    work = {
        "answer": (recipe.data.regenerate is not None, 'data.regenerate = "none" (spec regenerate --endpoint answers)'),
        "be captured": (not recipe.data.served, 'data.hidden_states = "server" (spec serve-states starts it)'),
        "be measured": (recipe.measures_itself, "data.server.evaluate = true"),
    }
    impossible = " or ".join(name for name, (is_due, _) in work.items() if is_due)
    server = [setting for is_due, setting in work.values() if is_due]
    sharded = ['distributed.shard_verifier = true and data.hidden_states = "cached"'] if device.count > 1 else []
    ways = ", or ".join([*sharded, " and ".join(server)])
    return [
        f"{device.name}: {need}, and one process loads it whole: it cannot {impossible} there. "
        f"Set {ways}; or take devices of at least {size_text(alone)}"
    ]
