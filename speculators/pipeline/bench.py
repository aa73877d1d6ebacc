"""The stage `bench`, and the evaluations during training, which measure the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch

from speculators.bench.context import TimedPair
from speculators.bench.replay import one_pass, replay
from speculators.bench.responses import own_rows
from speculators.bench.result import BenchResult
from speculators.bench.rows import JudgedResponse
from speculators.bench.run import bench
from speculators.events import Pieces, SuiteFacts, WarningEvent
from speculators.files.disk import disk_errors, write_json
from speculators.model import SpeculatorModel
from speculators.nn.precision import beside_verifier, compute_dtype, place
from speculators.pipeline.context import Context
from speculators.pipeline.served_verifier import ServedVerifier
from speculators.recipe.fingerprint import fingerprint, template_identity, verifier_identity
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.schema import BenchmarkSection
from speculators.runs.stages import TAU_AT, TrainingRecord, measured
from speculators.tracking.tracker import Tracker
from speculators.training.state import Evaluate
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.weights import load_head


def evaluation(context: Context, model: SpeculatorModel) -> Evaluate | None:
    """Builds the function that measures exact acceptance length: first suite, largest K, first temperature.

    Its metrics are the acceptance of each position and, where the same pass gives them, the lengths at every smaller
    K: the fingerprint of a training holds the largest K alone, so that the log must not depend on the others.

    Returns:
        None, after a warning, if the recipe names no suite or the algorithm lacks a hook.
    """
    section = context.recipe.benchmark
    if not section.suites:
        return None
    if lacking := lacking_hooks(context):
        consequence = "the last checkpoint is taken as the best (speculators/model.py says what the hooks must return)"
        context.emit(WarningEvent(message=f"acceptance length cannot be measured: {lacking}; {consequence}"))
        return None
    k_max, temperature = max(section.num_speculative_tokens), section.temperatures[0]
    block = section.block_verification
    smaller = range(1, k_max) if one_pass(model) else []
    rows = suite_rows(context, model.draft().target_layer_ids)
    computing = beside_verifier(getattr(torch, context.recipe.verifier.dtype), context.world.device)

    def evaluate() -> tuple[float, dict[str, float]]:
        # The loop broadcasts rank 0's answer.
        if not context.world.is_main:
            return 0.0, {}
        with computing:
            replayed = replay(model, rows, k_max=k_max, temperature=temperature, block_verification=block)
        counts = replayed.counts(k_max)
        metrics = {f"accept_{j}": rate for j, rate in enumerate(counts.by_position, start=1)}
        return counts.tau, metrics | {f"{TAU_AT}{k}": replayed.counts(k).tau for k in smaller}

    return evaluate


def lacking_hooks(context: Context) -> str:
    """Names the hooks that the algorithm lacks to be measured, as a clause; "" if it has all."""
    name = context.recipe.algorithm.name
    missing = SpeculatorModel.get_class(name).missing_hooks()
    return f"{name} has no {' and no '.join(missing)}" if missing else ""


def suite_rows(context: Context, layer_ids: Sequence[int]) -> list[JudgedResponse]:
    """Lets the verifier respond to the first suite at the first temperature, with the states that drafts read.

    Every process calls this.

    Args:
        layer_ids: whose states are kept.

    Returns:
        The responses on rank 0, nothing elsewhere.
    """
    section = context.recipe.benchmark
    suite, temperature = section.suites[0], section.temperatures[0]
    key = _rows_key(context, layer_ids)
    if key in context.kept:
        context.skip("suite", "an earlier run of this process has the same responses")
    else:
        # Only the latest: states of many suites would not fit into memory.
        context.kept.clear()
        with context.stage("suite") as result, _verifier(context) as engine:
            context.kept[key] = rows = [] if engine is None else _own_rows(context, engine, layer_ids)
            result.facts = SuiteFacts(suite=suite.name, responses=len(rows))
    context.rows[suite.name, temperature] = context.kept[key]
    return context.kept[key]


@contextmanager
def _verifier(context: Context) -> Iterator[RespondingVerifier | None]:
    """Gives rank 0 the verifier for the block, in this process or behind the server that evaluates; the others None."""
    if context.recipe.data.evaluates_served:
        yield ServedVerifier.of(context) if context.world.is_main else None
        return
    with context.lead(context.recipe.verifier.dtype) as engine:
        yield engine


def _own_rows(context: Context, engine: RespondingVerifier, layer_ids: Sequence[int]) -> list[JudgedResponse]:
    section = context.recipe.benchmark
    return own_rows(
        engine,
        load_head(engine.folder, engine.facts).to(engine.device),
        context.prompts(section.suites[0]),
        layer_ids,
        temperature=section.temperatures[0],
        token_filter=section.token_filter,
        max_new_tokens=section.max_new_tokens,
        seed=context.recipe.seed,
        progress=Pieces(stage="suite", pieces=1, listen=context.emit).piece(phases=2),
    )


def _rows_key(context: Context, layer_ids: Sequence[int]) -> str:
    """Fingerprints what the first suite's rows follow from; at T = 0 the seed is not among it."""
    recipe = context.recipe
    section, temperature = recipe.benchmark, recipe.benchmark.temperatures[0]
    return fingerprint(
        {
            "verifier": verifier_identity(recipe.verifier) | template_identity(recipe.verifier),
            "dtype": recipe.verifier.dtype,
            "served": recipe.data.evaluates_served,
            "device": str(context.world.device),
            "suite": context.plan.stage("prepare").inputs["held_out"][0],
            "layers": list(layer_ids),
            "temperature": temperature,
            "token_filter": section.token_filter.on,
            "max_new_tokens": section.max_new_tokens,
            "seed": recipe.seed if temperature else None,
        }
    )


def bench_stage(context: Context, tracker: Tracker) -> BenchResult | None:
    """Measures the run's speculator, unless that is done; every process calls this.

    Returns:
        The benchmark on rank 0; None elsewhere, without suites, and for algorithms that lack a hook.
    """
    section, world = context.recipe.benchmark, context.world
    if not section.suites:
        context.skip("bench", "the recipe names no suite")
        return None
    if lacking := lacking_hooks(context):
        context.emit(WarningEvent(message=f"bench is left out: {lacking}"))
        return None
    fingerprint = context.plan.stage("bench").fingerprint
    file = context.run_folder.benchmark(fingerprint)
    result = world.broadcast(measured(context.plan, context.places) if world.is_main else None)
    if result is not None:
        context.skip("bench", str(file))
    else:
        with context.stage("bench") as stage, _verifier(context) as engine:
            if engine is not None:
                result = attrs.evolve(_measure(context, engine), fingerprint=fingerprint)
                with disk_errors(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, result.to_json())
                record = TrainingRecord.read(context.run_folder)
                assert record is not None, "a speculator is measured, and its training is not recorded"
                tracker.bench(result, step=record.step)
                stage.detail = str(file)
    world.barrier()
    return result if world.is_main else None


def _measure(context: Context, engine: RespondingVerifier) -> BenchResult:
    recipe, run = context.recipe, context.run_folder

    def load() -> SpeculatorModel:
        return SpeculatorModel.from_pretrained(run.speculator, verifier=context.folder)

    whole = engine if isinstance(engine, Engine) and not engine.is_sharded else None
    if whole is None:
        left_out = "drafts are not decoded live and nothing is timed, since no process holds the whole verifier"
        cure = "serve the export, and spec bench --endpoint measures both"
        context.emit(WarningEvent(message=f"{left_out}: {cure}"))
    return bench(
        place(load(), context.world.device, beside=engine.dtype),
        engine,
        recipe.benchmark,
        name=run.name,
        seed=recipe.seed,
        progress=context.emit,
        known_rows=context.rows,
        load=context.prompts,
        live=whole is not None,
        timed=None if whole is None else timed_apart(recipe.benchmark, whole, load, recipe.verifier),
    )


def timed_apart(
    section: BenchmarkSection, engine: Engine, load: Callable[[], SpeculatorModel], verifier: VerifierSection
) -> TimedPair | None:
    """Loads verifier and speculator once more, in `timed_dtype`; None where that is the engine's own dtype.

    Args:
        load: makes the speculator as it was saved.
    """
    dtype = None if section.timed_dtype is None else getattr(torch, section.timed_dtype)
    if dtype is None or compute_dtype(dtype, engine.device) == engine.dtype:
        return None
    other = Engine(engine.folder, dtype=dtype, device=engine.device, section=verifier)
    return TimedPair(place(load(), engine.device, beside=other.dtype), other)
