"""What a recipe means for its verifier and launch: derived values and stages. Nothing has a default after this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError, Problem, RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.checks import check_recipe, check_verifier
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.fingerprint import source_identity
from speculators.recipe.schema import BenchmarkSection, Recipe
from speculators.recipe.stages import Stage, plan_stages
from speculators.recipe.token_filter import GENERATION_CONFIG, own_sampling
from speculators.recipe.values import as_tables
from speculators.structure.converter import structure


@attrs.frozen(kw_only=True)
class Plan:
    """A recipe resolved.

    Attributes:
        target_layer_ids: verifier layers whose states are read.
        draft_vocab_size: D, the tokens that the draft can propose.
        transformer_layer_config: the draft's decoder.
        row_tokens: tokens of a packed row.
        rows_per_step: rows of the global batch, shared by `world_size` processes.
        precision: what training computes in: the recipe's choice, or "fp32" on a device without bf16 products.
        stages: in order; "capture" only if states are stored, "bench" only if there are suites.
        parameters: parameter counts by part, filled in by the code that builds the model.
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

    @property
    def ends_in_last(self) -> bool:
        """Whether the last of the layers that are read is the verifier's last, which targets need, too."""
        return self.target_layer_ids[-1:] == (self.facts.num_hidden_layers,)

    def stage(self, name: str) -> Stage:
        """Finds a stage by name; raises KeyError if the plan has none of that name."""
        return {stage.name: stage for stage in self.stages}[name]

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each stage by its name."""
        return {stage.name: stage.fingerprint for stage in self.stages}

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The inputs of each stage as JSON values."""
        return {stage.name: dict(json.loads(json.dumps(stage.inputs))) for stage in self.stages}

    @property
    def run_name(self) -> str:
        """Name of the run folder. It changes with what is trained, not with what is measured afterwards."""
        return f"{self.recipe.name}-{self.stage('train').fingerprint[:8]}"

    @property
    def steps(self) -> int | None:
        """Optimizer updates; None if they depend on data that is not prepared yet."""
        return self.recipe.schedule.max_steps

    def to_dict(self) -> dict[str, Any]:
        """Converts the plan to the JSON values of plan.json."""
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
            # Every value without an origin is a default.
            "origins": {path: str(origin) for path, origin in self.recipe.origins.items() if origin.kind != "default"},
        }


def make_plan(recipe: Recipe, facts: VerifierFacts, *, world_size: int = 1) -> Plan:
    """Resolves a recipe for its verifier and launch, after every check that needs both.

    Args:
        facts: the verifier's config.json.
        world_size: number of processes that train.

    Raises:
        RecipeError: carries all problems across sections, with the verifier and with the launch.
    """
    recipe = attrs.evolve(recipe, benchmark=with_own_sampling(recipe.benchmark, facts))
    problems = [*check_recipe(recipe, world_size=world_size), *check_verifier(recipe, facts)]
    for index, source in enumerate(recipe.data.sources):
        # Hashing needs the file, so a missing one is reported first and alone.
        if problems or source.sha256 is None:
            continue
        if (actual := source_identity(source)["sha256"]) != source.sha256:
            place = f"data.sources[{index}].sha256"
            message = f"does not match the file {source.path}, whose sha256 is {actual}"
            problems.append(recipe.problem(place, message, "is it the file you mean?"))
    if problems:
        raise RecipeError(problems)
    config = recipe.algorithm.config
    return Plan(
        recipe=recipe,
        facts=facts,
        target_layer_ids=config.layer_ids(facts.num_hidden_layers),
        draft_vocab_size=config.draft_vocab_size or facts.vocab_size,
        transformer_layer_config=draft_decoder_config(facts, config),
        row_tokens=recipe.row_tokens,
        rows_per_step=recipe.schedule.tokens_per_step // recipe.row_tokens,
        precision=recipe.schedule.precision,
        world_size=world_size,
        stages=plan_stages(recipe, facts),
    )


def with_own_sampling(section: BenchmarkSection, facts: VerifierFacts) -> BenchmarkSection:
    """Replaces `temperature = "model"` by the verifier's own temperature and filters.

    Raises:
        RecipeError: the verifier's files do not say how to sample, contain values that a recipe may not have, or are
            greedy where the section has a key for sampling.
    """
    if section.temperature != "model":
        return section
    own, problems = structure(own_sampling(facts), BenchmarkSection, path=(GENERATION_CONFIG,), file=str(facts.folder))
    if own is None:
        raise RecipeError(problems)
    try:
        return attrs.evolve(section, temperature=own.temperature, top_p=own.top_p, top_k=own.top_k, min_p=own.min_p)
    except ValueError as error:
        raise RecipeError([Problem("benchmark", str(error))]) from None


# What readers of a plan.json rely on: tables of the recipe, stages, and inputs of the benchmark.
_SECTIONS = ("verifier", "data", "algorithm", "schedule", "benchmark", "expect")
_BENCHMARK = ("suites", "num_speculative_tokens", "temperature")
_STAGES = ("verifier", "prepare", "train")
_INPUTS = {
    "prepare": ("sources", "held_out"),
    "bench": ("dtype", "suites", "max_new_tokens", "temperature", "num_speculative_tokens"),
}


def read_plan(file: Path) -> dict[str, Any]:
    """Reads the plan of a run, as `to_dict` wrote it; older runs have fewer top-level keys.

    Raises:
        ArtifactError: plan.json is missing or damaged.
    """
    hint = "run its recipe again with spec run to write it anew"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: missing or damaged: {error}", hint=hint) from error
    if wrong := _damage(document):
        raise ArtifactError(f"{file}: damaged: {wrong}", hint=hint)
    return dict(document)


def _damage(document: Any) -> str:
    """Describes what makes a plan unusable; "" if nothing does."""
    if not isinstance(document, dict) or not isinstance(document.get("recipe"), dict):
        return "it has no table 'recipe'"
    if lacking := [name for name in _SECTIONS if not isinstance(document["recipe"].get(name), dict)]:
        return f"its recipe lacks {', '.join(lacking)}"
    if lacking := [name for name in _BENCHMARK if not isinstance(document["recipe"]["benchmark"].get(name), list)]:
        return f"its recipe lacks {', '.join(f'benchmark.{name}' for name in lacking)}"
    if "summary" not in document["recipe"]:
        return "its recipe lacks summary"
    if not isinstance(document.get("origins", {}), dict):
        return f"its origins are {document['origins']!r}"
    try:
        inputs = {
            stage["name"]: stage["inputs"] for stage in document["stages"] if isinstance(stage["fingerprint"], str)
        }
        lacking = [name for name in _STAGES if name not in inputs]
        lacking += [
            f"{name}.{key}" for name in _INPUTS if name in inputs for key in _INPUTS[name] if key not in inputs[name]
        ]
    except (KeyError, TypeError) as error:
        return f"its stages lack {error}" if isinstance(error, KeyError) else "its stages are not a list of tables"
    return f"its stages lack {', '.join(lacking)}" if lacking else ""
