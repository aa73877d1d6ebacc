"""What a recipe means for this verifier and launch: derived values, stages, fingerprints. No defaults after this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.config import default_layer_ids
from speculators.errors import ArtifactError, RecipeError
from speculators.facts import VerifierFacts
from speculators.files.disk import file_sha256
from speculators.recipe.checks import check_recipe, check_verifier
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.fingerprint import (
    checkpoint_identity,
    code_identity,
    fingerprint,
    section_values,
    source_identity,
    suite_identity,
    verifier_identity,
)
from speculators.recipe.schema import Recipe
from speculators.recipe.values import as_tables

__all__ = ["Plan", "Stage", "default_layer_ids", "draft_decoder_config", "file_sha256", "make_plan"]

# Raised when what a stage writes changes its meaning, so that outputs of older code are not taken for current ones.
STAGE_VERSIONS = {"verifier": 1, "prepare": 1, "capture": 1, "train": 1, "bench": 2}


@attrs.frozen
class Stage:
    """One stage of the pipeline.

    Attributes:
        fingerprint: 64 hex digits; the same for the same inputs, whatever the machine.
        inputs: exactly what can change the stage's output, as JSON values.
    """

    name: str
    fingerprint: str
    inputs: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Plan:
    """A recipe resolved.

    Attributes:
        target_layer_ids: verifier layers whose states are read.
        draft_vocab_size: D.
        transformer_layer_config: the draft's decoder.
        row_tokens: tokens of a packed row.
        rows_per_step: rows of the global batch, shared by `world_size` processes.
        precision: what training computes in: the recipe's, or "fp32" where the device of a run has no bf16 products.
        stages: in order; "capture" only for states that are stored, "bench" only with suites.
        parameters: parameter counts by part, filled by whoever builds the model.
    """

    recipe: Recipe
    facts: VerifierFacts
    target_layer_ids: tuple[int, ...]
    draft_vocab_size: int
    transformer_layer_config: dict[str, Any]
    row_tokens: int
    rows_per_step: int
    precision: str
    world_size: int
    stages: tuple[Stage, ...]
    parameters: dict[str, int] = attrs.field(factory=dict)

    def stage(self, name: str) -> Stage:
        """Returns the stage of that name; raises KeyError if the plan has none."""
        return {stage.name: stage for stage in self.stages}[name]

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Returns the inputs of each stage as JSON values."""
        return {stage.name: dict(json.loads(json.dumps(stage.inputs))) for stage in self.stages}

    @property
    def run_name(self) -> str:
        """Returns the name of the run folder: it changes with what is trained, not with what is measured after."""
        return f"{self.recipe.name}-{self.stage('train').fingerprint[:8]}"

    @property
    def steps(self) -> int | None:
        """Returns the optimizer updates, None where they depend on data that is not prepared yet."""
        return self.recipe.schedule.max_steps

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {
            "run_name": self.run_name,
            "recipe": as_tables(self.recipe),
            "target_layer_ids": list(self.target_layer_ids),
            "draft_vocab_size": self.draft_vocab_size,
            "transformer_layer_config": self.transformer_layer_config,
            "row_tokens": self.row_tokens,
            "rows_per_step": self.rows_per_step,
            "precision": self.precision,
            "world_size": self.world_size,
            "steps": self.steps,
            "parameters": self.parameters,
            "stages": [attrs.asdict(stage) for stage in self.stages],
            # Every other value is a default.
            "origins": {path: str(origin) for path, origin in self.recipe.origins.items() if origin.kind != "default"},
        }


def make_plan(recipe: Recipe, facts: VerifierFacts, *, world_size: int = 1) -> Plan:
    """Returns the plan of a recipe.

    Args:
        facts: the verifier's config.json.
        world_size: processes that train.

    Raises:
        RecipeError: with all problems across sections, with the verifier and with the launch.
    """
    problems = [*check_recipe(recipe, world_size=world_size), *check_verifier(recipe, facts)]
    for index, source in enumerate(recipe.data.sources):
        if not problems and source.is_file and source.sha256 not in (None, found := source_identity(source)["sha256"]):
            place = f"data.sources[{index}].sha256"
            problems.append(recipe.problem(place, f"is not the file's, which is {found}", "is it the file you mean?"))
    if problems:
        raise RecipeError(problems)
    config = recipe.algorithm.config
    row_tokens = recipe.schedule.row_tokens or recipe.data.max_tokens
    plan = Plan(
        recipe=recipe,
        facts=facts,
        target_layer_ids=config.layer_ids(facts.num_hidden_layers),
        draft_vocab_size=config.draft_vocab_size or facts.vocab_size,
        transformer_layer_config=draft_decoder_config(facts, config),
        row_tokens=row_tokens,
        rows_per_step=recipe.schedule.tokens_per_step // row_tokens,
        precision=recipe.schedule.precision,
        world_size=world_size,
        stages=(),
    )
    return attrs.evolve(plan, stages=_stages(plan))


def _stages(plan: Plan) -> tuple[Stage, ...]:
    """Returns the stages; each has the fingerprints of those it reads among its inputs."""
    recipe, dtype = plan.recipe, plan.recipe.verifier.dtype
    suites = [suite_identity(suite) for suite in recipe.benchmark.suites]
    made: dict[str, Stage] = {}

    def add(name: str, *reads: str, **inputs: Any) -> None:
        inputs |= {"version": STAGE_VERSIONS[name], **{stage: made[stage].fingerprint for stage in reads}}
        made[name] = Stage(name, fingerprint(inputs), inputs)

    add("verifier", **verifier_identity(recipe.verifier))
    regenerate = recipe.data.regenerate
    add(
        "prepare",
        "verifier",
        sources=[source_identity(source) for source in recipe.data.sources],
        max_tokens=recipe.data.max_tokens,
        regenerate={**section_values(regenerate), "dtype": regenerate.dtype or dtype} if regenerate else None,
        # Their prompts are kept out of the training data.
        held_out=suites,
    )
    stored = recipe.data.stored
    if stored:
        states_dtype = recipe.data.states_dtype
        layer_ids = list(plan.target_layer_ids)
        # A server multiplies in other kernels and other batches: the same states, but not the same bits, so its store
        # is never taken for one captured in process. Where it is and how many requests it has at once is no input.
        by = {"by": "server"} if recipe.data.served else {}
        add("capture", "verifier", "prepare", layer_ids=layer_ids, dtype=dtype, states_dtype=states_dtype, **by)
    states, how = (("capture",), {}) if stored else (("verifier",), {"states_dtype": recipe.data.states_dtype})
    add("train", *states, "prepare", dtype=dtype, **how, **_train_inputs(plan, suites))
    if suites:
        bench = section_values(recipe.benchmark, "suites")
        add("bench", "train", "verifier", dtype=dtype, suites=suites, **bench)
    return tuple(made.values())


def _train_inputs(plan: Plan, suites: list[dict[str, Any]]) -> dict[str, Any]:
    recipe, bench = plan.recipe, plan.recipe.benchmark
    derived = ("target_layer_ids", "draft_vocab_size", "decoder")
    knobs = as_tables(recipe)["algorithm"]
    # The best checkpoint is chosen on the first suite, at the largest K and the first temperature.
    chosen_on = [suites[0], max(bench.num_speculative_tokens), bench.temperature[0]] if suites else None
    code = code_identity(type(recipe.algorithm.config))
    return {
        **({"code": code} if code else {}),
        "seed": recipe.seed,
        "algorithm": {key: value for key, value in knobs.items() if key not in (*derived, "module", "init_from")},
        **({"init_from": checkpoint_identity(Path(knobs["init_from"]))} if knobs["init_from"] else {}),
        "target_layer_ids": list(plan.target_layer_ids),
        "draft_vocab_size": plan.draft_vocab_size,
        "decoder": plan.transformer_layer_config,
        "row_tokens": plan.row_tokens,
        # How often checkpoints are written changes none of them; nor does how many processes share the rows.
        "schedule": section_values(recipe.schedule, "row_tokens", "checkpoint_every", "keep_checkpoints"),
        "chosen_on": chosen_on,
    }


# What a reader of a plan.json relies on: tables of the recipe, stages, and inputs of the benchmark.
_SECTIONS = ("verifier", "data", "algorithm", "schedule", "benchmark", "expect")
_BENCHMARK = ("suites", "num_speculative_tokens", "temperature")
_STAGES = ("verifier", "prepare", "train")
_INPUTS = {
    "prepare": ("sources", "held_out"),
    "bench": ("dtype", "suites", "max_new_tokens", "temperature", "num_speculative_tokens"),
}


def read_plan(folder: Path) -> dict[str, Any]:
    """Returns the plan that a run wrote down, as `to_dict` gave it; older runs have fewer keys at its top.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    file = folder / "plan.json"
    hint = "spec run of its recipe writes it again"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: missing or damaged: {error}", hint=hint) from error
    if wrong := _damage(held):
        raise ArtifactError(f"{file}: damaged: {wrong}", hint=hint)
    return dict(held)


def _damage(held: Any) -> str:
    """Returns what is wrong with a plan that was read, "" for nothing."""
    if not isinstance(held, dict) or not isinstance(held.get("recipe"), dict):
        return "it has no table 'recipe'"
    if lacking := [name for name in _SECTIONS if not isinstance(held["recipe"].get(name), dict)]:
        return f"its recipe lacks {', '.join(lacking)}"
    if lacking := [name for name in _BENCHMARK if not isinstance(held["recipe"]["benchmark"].get(name), list)]:
        return f"its recipe lacks {', '.join(f'benchmark.{name}' for name in lacking)}"
    if "summary" not in held["recipe"]:
        return "its recipe lacks summary"
    if not isinstance(held.get("origins", {}), dict):
        return f"its origins are {held['origins']!r}"
    try:
        inputs = {stage["name"]: stage["inputs"] for stage in held["stages"] if isinstance(stage["fingerprint"], str)}
        lacking = [name for name in _STAGES if name not in inputs]
        lacking += [
            f"{name}.{key}" for name in _INPUTS if name in inputs for key in _INPUTS[name] if key not in inputs[name]
        ]
    except (KeyError, TypeError) as error:
        return f"its stages lack {error}" if isinstance(error, KeyError) else "its stages are no list of tables"
    return f"its stages lack {', '.join(lacking)}" if lacking else ""
