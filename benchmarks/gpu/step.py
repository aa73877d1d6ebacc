"""The part `step`: one update of real recipes, with random weights: speed, kernels, and memory beside the plan."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.gpu.built import Trainee, plan_of
from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from speculators.cost.sizes import costs_of
from speculators.recipe.plan import Plan
from speculators.runs.places import Places

RECIPES = {"eagle3_llama8b": "llama-3.1-8b", "dflash_qwen3_8b": "qwen3-8b", "peagle_qwen3_8b": "qwen3-8b"}
# Tokens of a document, as the recipes' own figures assume.
DOCUMENT = 1024
# Rows of one update: fewer than the recipes', whose other rows would only repeat them.
ROWS = 4
UPDATES = 3
# Measured over planned peak that still passes: the allocator rounds, and kernels have buffers that no plan counts.
TOLERATED_PEAK = 1.25
# Not kernels, though they run on the GPU.
COPIES = ("Memcpy", "Memset")


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each recipe."""
    for recipe, fixture in RECIPES.items():
        yield judged(recipe, partial(measured, setup, recipe, fixture))
        setup.release()


def measured(setup: PartSetup, recipe: str, fixture: str) -> Judged:
    """Times updates and profiles one more; fails where it takes a quarter more memory than is planned."""
    setup.release()
    plan = plan_of(recipe, fixture, setup)
    document = 16 if setup.small else DOCUMENT
    documents = 2 if setup.small else plan.row_tokens // document
    trainee = Trainee.of(plan, [document] * documents, ROWS, setup.device)
    trainee.update()
    waits = _waits(trainee)
    began = time.perf_counter()
    for _ in range(UPDATES):
        trainee.update()
    setup.wait()
    seconds = (time.perf_counter() - began) / UPDATES
    peak = setup.peak_gb
    figures = {
        "tokens_per_s": trainee.batch.tokens / seconds,
        "rows": ROWS,
        "row_tokens": trainee.batch.tokens // ROWS,
        "waits_for_the_device": waits,
        **_profiled(setup, trainee),
        "peak_gb": peak,
    }
    planned = planned_gb(plan, setup)
    figures |= {"planned_gb": planned}
    over = setup.device.type == "cuda" and not setup.small and peak > TOLERATED_PEAK * planned
    return figures, f"the peak of {peak:.1f} GB is far above the planned {planned:.1f} GB" if over else ""


def planned_gb(plan: Plan, setup: PartSetup) -> float:
    """Sums `spec plan`'s parts of a process's memory, as far as they are there: no verifier runs, no rows wait."""
    folder, tokens = setup.folder / "plan", min(DOCUMENT, plan.recipe.data.max_tokens)
    costs = costs_of(plan, Places(runs=folder, cache=folder), kind=setup.device.type, mean_tokens=tokens)
    parts = costs.memory(1, capture_tokens=0, rows_on_host=True)
    beside = parts["verifier"] - costs.row.head_bytes
    return (sum(parts.values()) - beside - parts["rows"] + costs.row_bytes) / 1e9


def _waits(trainee: Trainee) -> int:
    """Counts how often one update waits for the device; reading loss and norm at its end is one."""
    if trainee.worker.world.device.type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainee.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def _profiled(setup: PartSetup, trainee: Trainee) -> dict[str, Any]:
    """Counts the kernels of one update, and the share of its time in which one of them runs."""
    # Without CUPTI, the profiler of a GPU sees no kernel.
    if ProfilerActivity.CUDA not in supported_activities():
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        trainee.update()
        setup.wait()
        microseconds = 1e6 * (time.perf_counter() - began)
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.time_range for event in on_device if not event.name.startswith(COPIES)]
    return {"kernels": len(kernels), "busy_share": union([(k.start, k.end) for k in kernels]) / microseconds}


def union(spans: list[tuple[float, float]]) -> float:
    """Adds up the time that is covered by at least one span."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
