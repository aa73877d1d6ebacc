"""The stage `train`: model, rows and evaluation put together; the best checkpoint exported as a speculator."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from speculators.bench.replay import one_pass, replay
from speculators.bench.responses import own_rows
from speculators.bench.rows import JudgedResponse
from speculators.bench.suites import load_suite
from speculators.contract import parameter_counts, trainer_kwargs
from speculators.data.encoded import Conversations
from speculators.events import WarningEvent
from speculators.files.whole import file_sha256, read_json, whole_folder, write_json, write_whole
from speculators.init_from import start_model
from speculators.model import SpeculatorModel
from speculators.nn.precision import place
from speculators.pipeline.build import training_kwargs, vocabulary_of
from speculators.pipeline.context import Context
from speculators.pipeline.feed import Feed
from speculators.pipeline.inputs import state_source
from speculators.runs.stages import SPECULATOR, TAU_AT, TRAINED
from speculators.training.checkpoint import best, latest
from speculators.training.loop import train
from speculators.training.rng import deterministic
from speculators.training.snapshot import load_weights
from speculators.training.state import Evaluate, Job
from speculators.verifier.weights import load_head


def train_stage(context: Context, prepared: Conversations) -> None:
    """Trains from the newest checkpoint, or from the start, and exports the best one."""
    began = time.monotonic()
    vocabulary, covers = vocabulary_of(context, prepared)
    kwargs = training_kwargs(context.plan, str(context.folder), vocabulary)
    name, recipe = context.recipe.algorithm.name, context.recipe
    deterministic(recipe.seed)
    model = start_model(name, context.plan.facts, kwargs)
    train_kwargs, _ = trainer_kwargs(model, kwargs)
    place(model, context.world.device)
    feed = Feed(context, prepared, state_source(context, prepared), model.align)
    evaluate = _evaluation(context, model)
    if recipe.data.stored:
        context.free_engine()
    job = Job(
        schedule=attrs.evolve(recipe.schedule, precision=context.plan.precision),
        total_steps=feed.total_steps,
        seed=recipe.seed,
        folder=context.run_folder / "checkpoints",
        fingerprint=context.plan.stage("train").fingerprint,
        shard=recipe.distributed.shard,
    )
    with context.stage("train") as words:
        trainable = parameter_counts(model)["trainable"]
        steps = train(model, job, context.world, batches=feed, train_kwargs=train_kwargs, evaluate=evaluate)
        with feed.ahead:
            for event in steps:
                context.tell(event)
        if context.world.is_main:
            held = _export(context, start_model(name, context.plan.facts, kwargs), job, time.monotonic() - began)
            words += [f"{trainable:,} trainable parameters", covers, _best_words(held)]
        context.world.barrier()


def _best_words(held: dict[str, Any]) -> str:
    if held["tau"] is None:
        return f"no suite to choose by: the last of {held['step']} updates is taken"
    return f"best at update {held['step']} of {held['total_steps']}, acceptance length {held['tau']:.3f}"


def _evaluation(context: Context, model: SpeculatorModel) -> Evaluate | None:
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


def _export(context: Context, model: SpeculatorModel, job: Job, seconds: float) -> dict[str, Any]:
    """Writes `speculator/` from the best checkpoint, and last the note that the stage is done."""
    chosen = best(job.folder) or latest(job.folder)
    assert chosen is not None, "training ended without a checkpoint"
    load_weights(model, chosen)
    folder = context.run_folder / SPECULATOR
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
    held = read_json(chosen / "manifest.json")
    done = {
        "fingerprint": job.fingerprint,
        "checkpoint": chosen.name,
        "step": int(chosen.name.removeprefix("step-")),
        "total_steps": job.total_steps,
        "tau": held["tau"],
        "seconds": round(seconds, 1),
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(context.run_folder / TRAINED, done)
    return done


def serve_with(context: Context, held: Mapping[str, Any]) -> str:
    """Puts the recipe's first K into a speculator that was exported with another, for servers draft as it says.

    Returns:
        What was changed, in words; "" where it said so already.
    """
    file, wanted = context.run_folder / SPECULATOR / "config.json", context.recipe.benchmark.num_speculative_tokens[0]
    config = json.loads(file.read_text(encoding="utf-8"))
    method = config["speculators_config"]["proposal_methods"][0]
    before = method["speculative_tokens"]
    if before == wanted:
        return ""
    method["speculative_tokens"] = wanted
    write_whole(file, (json.dumps(config, indent=2) + "\n").encode())
    note = {**held, "files": {**held["files"], file.name: file_sha256(file)}}
    write_json(context.run_folder / TRAINED, note)
    return f"; servers draft {wanted} tokens a round now, {before} before"
