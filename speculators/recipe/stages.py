"""What each stage of the pipeline reads of a recipe: the inputs in its fingerprint, and the keys behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.config import is_off
from speculators.facts import VerifierFacts
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.fingerprint import (
    checkpoint_identity,
    code_identity,
    fingerprint,
    section_values,
    source_identity,
    suite_identity,
    template_identity,
    verifier_identity,
)
from speculators.recipe.schema import Recipe
from speculators.recipe.values import as_tables

# Raised when a stage's output changes its meaning, so that outputs of older code are not reused.
STAGE_VERSIONS = {"verifier": 1, "prepare": 1, "capture": 1, "train": 1, "bench": 2}
# Raised when the verifier's own answers change their meaning: 2 keeps their ids, and answers every turn.
ANSWERS_VERSION = 2


@attrs.frozen
class Stage:
    """One stage of the pipeline.

    Attributes:
        fingerprint: 64 hex digits; the same for the same inputs on every machine.
        inputs: exactly what can change the stage's output, as JSON values.
    """

    name: str
    fingerprint: str
    inputs: Mapping[str, Any]


@attrs.frozen
class Inputs:
    """Inputs of a stage that follow from the same keys of the recipe.

    Attributes:
        reads: TOML paths that decide the values; a path covers everything below it.
        values: computes the inputs by name, as JSON values. It may hash files, so only planning calls it.
    """

    reads: tuple[str, ...]
    values: Callable[[VerifierFacts], Mapping[str, Any]]

    def covers(self, path: str) -> bool:
        """Whether the value at a TOML path decides these inputs."""
        return any(path == read or path.startswith((f"{read}.", f"{read}[")) for read in self.reads)


@attrs.frozen
class StageInputs:
    """A stage before it is planned.

    Attributes:
        after: earlier stages whose output it reads; their fingerprints are inputs, too.
        own: its other inputs.
    """

    name: str
    after: tuple[str, ...]
    own: tuple[Inputs, ...]

    def reads(self, path: str) -> bool:
        """Whether the value at a TOML path is among the stage's own inputs."""
        return any(inputs.covers(path) for inputs in self.own)


def plan_stages(recipe: Recipe, facts: VerifierFacts) -> tuple[Stage, ...]:
    """Computes the inputs and fingerprint of each stage, in order."""
    stages: dict[str, Stage] = {}
    for stage in stage_inputs(recipe):
        inputs: dict[str, Any] = {}
        for group in stage.own:
            inputs |= group.values(facts)
        inputs |= {"version": STAGE_VERSIONS[stage.name]}
        inputs |= {name: stages[name].fingerprint for name in stage.after}
        stages[stage.name] = Stage(stage.name, fingerprint(inputs), inputs)
    return tuple(stages.values())


def stage_inputs(recipe: Recipe) -> tuple[StageInputs, ...]:
    """Lists the stages of a recipe with what each reads.

    This is the only place that says so: `plan_stages` computes the values, `spec show --why` asks which keys they
    follow from.
    """
    data = recipe.data
    dtype = _value(recipe, "verifier.dtype")
    suite_values = functools.cache(lambda: [suite_identity(suite) for suite in recipe.benchmark.suites])
    suite_reads = _suite_paths(recipe)
    stages = [
        StageInputs(
            "verifier",
            (),
            (
                Inputs(_verifier_paths(recipe), lambda _: verifier_identity(recipe.verifier)),
                Inputs(("verifier.template", "verifier.chat_template"), lambda _: template_identity(recipe.verifier)),
            ),
        ),
        StageInputs(
            "prepare",
            ("verifier",),
            (
                Inputs(_source_paths(recipe), lambda _: {"sources": [source_identity(each) for each in data.sources]}),
                _value(recipe, "data.max_tokens"),
                Inputs(("data.train_on",), lambda _: {} if data.train_on == "all" else {"train_on": data.train_on}),
                _regenerate(recipe),
                # The suites' prompts are kept out of the training data.
                Inputs(suite_reads, lambda _: {"held_out": suite_values()}),
            ),
        ),
    ]
    # A server multiplies in other kernels and other batches: the same states, but not the same bits, so they are never
    # taken for those of this process. The server's address and load are not inputs.
    engine = Inputs(("data.hidden_states",), lambda _: {"by": "server"} if data.served else {})
    if data.stored:
        capture = (_layer_ids(recipe, "layer_ids"), dtype, _value(recipe, "data.states_dtype"), engine)
        stages.append(StageInputs("capture", ("verifier", "prepare"), capture))
        # Which stage the states come from is decided by this key, too.
        states, states_from = [Inputs(("data.hidden_states",), lambda _: {})], "capture"
    else:
        states, states_from = [engine, _value(recipe, "data.states_dtype")], "verifier"
    train = (dtype, *states, *_train_inputs(recipe, suite_values))
    stages.append(StageInputs("train", (states_from, "prepare"), train))
    if recipe.benchmark.suites:
        bench = (
            dtype,
            Inputs(suite_reads, lambda _: {"suites": suite_values()}),
            Inputs(_field_paths(recipe, "benchmark", "suites"), lambda _: section_values(recipe.benchmark, "suites")),
        )
        stages.append(StageInputs("bench", ("train", "verifier"), bench))
    return tuple(stages)


def _train_inputs(recipe: Recipe, suite_values: Callable[[], list[dict[str, Any]]]) -> tuple[Inputs, ...]:
    config, bench, schedule = recipe.algorithm.config, recipe.benchmark, recipe.schedule
    table = as_tables(recipe)["algorithm"]
    # These enter by what they mean for the verifier, or by content, below.
    indirect = ("target_layer_ids", "draft_vocab_size", "decoder", "module", "init_from")
    algorithm = {key: value for key, value in table.items() if key not in indirect}
    off = {field.name for field in config.recipe_fields() if is_off(field, getattr(config, field.name))}
    # Neither how often checkpoints are written nor how many processes share the rows changes a weight.
    cadence = ("row_tokens", "checkpoint_every", "keep_checkpoints")
    row_reads = ("schedule.row_tokens", *(() if schedule.row_tokens else ("data.max_tokens",)))

    def code(_: VerifierFacts) -> dict[str, Any]:
        digest = code_identity(type(config))
        return {"code": digest} if digest else {}

    def init_from(_: VerifierFacts) -> dict[str, Any]:
        return {"init_from": checkpoint_identity(Path(config.init_from))} if config.init_from else {}

    def chosen_on(_: VerifierFacts) -> dict[str, Any]:
        # The best checkpoint is chosen on the first suite, at the largest K and the first temperature.
        if not bench.suites:
            return {"chosen_on": None}
        first = [suite_values()[0], max(bench.num_speculative_tokens), bench.temperatures[0]]
        how: list[Any] = [bench.token_filter.on] if bench.token_filter.on else []
        how += [bench.verification] if bench.block_verification else []
        return {"chosen_on": [*first, *how] if samples else first}

    samples = bench.temperature == "model" or bench.temperatures[0] > 0
    keys = ["num_speculative_tokens", "temperature"]
    keys += ["top_p", "top_k", "min_p", "verification"] if samples else []
    choice = tuple(f"benchmark.{key}" for key in keys) if bench.suites else ()
    return (
        Inputs(("algorithm.module",) if recipe.algorithm.module else (), code),
        _value(recipe, "seed"),
        Inputs(
            tuple(f"algorithm.{key}" for key in algorithm),
            lambda _: {"algorithm": {key: value for key, value in algorithm.items() if key not in off}},
        ),
        Inputs(("algorithm.init_from",), init_from),
        _layer_ids(recipe, "target_layer_ids"),
        Inputs(
            ("algorithm.draft_vocab_size",),
            lambda facts: {"draft_vocab_size": config.draft_vocab_size or facts.vocab_size},
        ),
        Inputs(
            ("algorithm.decoder", "algorithm.num_layers", "algorithm.target_layer_ids"),
            lambda facts: {"decoder": draft_decoder_config(facts, config)},
        ),
        Inputs(row_reads, lambda _: {"row_tokens": recipe.row_tokens}),
        Inputs(_field_paths(recipe, "schedule", *cadence), lambda _: {"schedule": section_values(schedule, *cadence)}),
        Inputs((*_suite_paths(recipe, only_first=True), *choice), chosen_on),
    )


def _value(recipe: Recipe, path: str) -> Inputs:
    """A single value of the recipe, under its last key."""
    value = functools.reduce(getattr, path.split("."), recipe)
    return Inputs((path,), lambda _: {path.rpartition(".")[2]: value})


def _layer_ids(recipe: Recipe, name: str) -> Inputs:
    # Without ids of its own, a recipe reads the layers that its algorithm chooses.
    layer_ids = recipe.algorithm.config.layer_ids
    return Inputs(
        ("algorithm.target_layer_ids", "algorithm.name"),
        lambda facts: {name: list(layer_ids(facts.num_hidden_layers))},
    )


def _regenerate(recipe: Recipe) -> Inputs:
    regenerate, dtype = recipe.data.regenerate, recipe.verifier.dtype
    if regenerate is None:
        return Inputs(("data.regenerate",), lambda _: {"regenerate": None})
    values = {**section_values(regenerate), "dtype": regenerate.dtype or dtype, "version": ANSWERS_VERSION}
    inherited = () if regenerate.dtype else ("verifier.dtype",)
    return Inputs(("data.regenerate", *inherited), lambda _: {"regenerate": values})


def _field_paths(recipe: Recipe, section: str, *leave_out: str) -> tuple[str, ...]:
    names = [field.name for field in attrs.fields(type(getattr(recipe, section)))]
    return tuple(f"{section}.{name}" for name in names if name not in leave_out)


def _verifier_paths(recipe: Recipe) -> tuple[str, ...]:
    # A hub id is identified by its commit, a file by its content, which `sha256` may name.
    content = "verifier.revision" if recipe.verifier.kind == "hub" else "verifier.sha256"
    return ("verifier.model", content, "verifier.trust_remote_code")


def _source_paths(recipe: Recipe) -> tuple[str, ...]:
    paths: list[str] = []
    for index, source in enumerate(recipe.data.sources):
        # The content of a file is hashed: its `sha256` is only compared with that.
        keys = ("path", "split", "take", "map", *(() if source.is_local else ("subset", "revision")))
        paths += [f"data.sources[{index}].{key}" for key in keys]
    return tuple(paths)


def _suite_paths(recipe: Recipe, *, only_first: bool = False) -> tuple[str, ...]:
    paths: list[str] = []
    for index, suite in enumerate(recipe.benchmark.suites[:1] if only_first else recipe.benchmark.suites):
        # The name of a suite matters only where it is looked up in the catalogue.
        keys = ("path", "split", "take", "map", "subset", "revision", *(() if suite.path else ("name",)))
        paths += [f"benchmark.suites[{index}].{key}" for key in keys]
    return tuple(paths) or ("benchmark.suites",)
