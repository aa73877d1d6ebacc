"""The stage `bench`, and the evaluations of training that measure the same way."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from speculators.bench.replay import one_pass, replay
from speculators.bench.responses import own_rows
from speculators.bench.result import BenchResult
from speculators.bench.rows import JudgedResponse
from speculators.bench.run import bench
from speculators.bench.suites import load_suite
from speculators.events import WarningEvent
from speculators.files.disk import disk_errors, read_json, write_json
from speculators.model import SpeculatorModel
from speculators.nn.precision import place
from speculators.pipeline.context import Context
from speculators.runs.stages import SPECULATOR, TAU_AT, TRAINED, bench_file, measured
from speculators.tracking.tracker import Tracker
from speculators.training.state import Evaluate
from speculators.verifier.weights import load_head


def evaluation(context: Context, model: SpeculatorModel) -> Evaluate | None:
    """Returns what measures exact acceptance length: first suite, largest K, first temperature.

    Its metrics are the acceptance of each position, and the lengths at every smaller K where the same pass gives them:
    a log tells nothing that the fingerprint does not hold, and that holds the largest K alone.
    """
    section = context.recipe.benchmark
    if not section.suites:
        return None
    if lacking := lacking_hooks(context):
        words = "the last checkpoint is taken as the best (speculators/model.py says what the hooks must return)"
        context.tell(WarningEvent(message=f"acceptance length cannot be measured: {lacking}; {words}"))
        return None
    k_max, temperature = max(section.num_speculative_tokens), section.temperature[0]
    smaller = range(1, k_max) if one_pass(model) else []
    rows = suite_rows(context, model.draft().target_layer_ids) if context.world.is_main else []

    def evaluate() -> tuple[float, dict[str, float]]:
        if not context.world.is_main:
            return 0.0, {}
        replayed = replay(model, rows, k_max=k_max, temperature=temperature)
        counts = replayed.counts(k_max)
        metrics = {f"accept_{j}": rate for j, rate in enumerate(counts.by_position, start=1)}
        return counts.tau, metrics | {f"{TAU_AT}{k}": replayed.counts(k).tau for k in smaller}

    return evaluate


def lacking_hooks(context: Context) -> str:
    """Returns in words which hooks the algorithm has not, "" if it can be measured."""
    name = context.recipe.algorithm.name
    missing = SpeculatorModel.get_class(name).missing_hooks()
    return f"{name} has no {' and no '.join(missing)}" if missing else ""


def suite_rows(context: Context, layer_ids: Sequence[int]) -> list[JudgedResponse]:
    """Returns the first suite's responses at the first temperature with the states that drafts are made from."""
    section, engine = context.recipe.benchmark, context.engine(context.recipe.verifier.dtype)
    head = load_head(engine.folder, engine.facts).to(engine.device)
    with context.stage("suite") as words:
        rows = own_rows(
            engine,
            head,
            load_suite(section.suites[0]),
            layer_ids,
            temperature=section.temperature[0],
            max_new_tokens=section.max_new_tokens,
            seed=context.recipe.seed,
            progress=context.tell,
        )
        words.append(f"{len(rows)} responses of {section.suites[0].name}")
    context.rows[section.suites[0].name, section.temperature[0]] = rows
    return rows


def bench_stage(context: Context, tracker: Tracker) -> BenchResult | None:
    section, world = context.recipe.benchmark, context.world
    if not section.suites:
        context.skip("bench", "the recipe names no suite")
        return None
    if lacking := lacking_hooks(context):
        context.tell(WarningEvent(message=f"bench is left out: {lacking}"))
        return None
    if not world.is_main:
        world.barrier()
        return None
    file = bench_file(context.plan, context.places)
    if result := measured(context.plan, context.places):
        context.skip("bench", str(file))
    else:
        with context.stage("bench") as words:
            fingerprint = context.plan.stage("bench").fingerprint
            result = attrs.evolve(_measure(context), fingerprint=fingerprint)
            with disk_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result.to_json())
            tracker.bench(result, step=read_json(context.run_folder / TRAINED)["step"])
            words.append(str(file))
    world.barrier()
    return result


def _measure(context: Context) -> BenchResult:
    recipe = context.recipe
    speculator = SpeculatorModel.from_pretrained(context.run_folder / SPECULATOR, verifier=context.folder)
    model = place(speculator, context.world.device)
    engine = context.engine(recipe.verifier.dtype)
    return bench(
        model,
        engine,
        recipe.benchmark,
        name=context.run_folder.name,
        seed=recipe.seed,
        progress=context.tell,
        known_rows=context.rows,
    )
