"""The arms of an ablation, checked before anything runs: every recipe loads, and all measure the same."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from speculators.ablation.document import BASE, FIXED, Ablation
from speculators.errors import Problem, RecipeError
from speculators.recipe.checks import check_recipe
from speculators.recipe.document import overrides_table
from speculators.recipe.expect import setting_key
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Recipe, Suite
from speculators.registry import near_miss
from speculators.structure.origin import Part, path_text


@attrs.frozen(kw_only=True)
class Arm:
    """The base or a variant.

    Attributes:
        name: "base", or the variant's.
        options: what it changes beyond the options that all arms share.
        recipes: its recipe with each seed.
    """

    name: str
    options: tuple[str, ...]
    recipes: dict[int, Recipe]

    @property
    def recipe(self) -> Recipe:
        """Its recipe with the first seed."""
        return next(iter(self.recipes.values()))


@attrs.frozen(kw_only=True)
class Contest:
    """An ablation whose recipes have been loaded.

    Attributes:
        suite, k, temperature: the setting that decides.
        arms: the base, then the variants.
    """

    ablation: Ablation
    suite: Suite
    k: int
    temperature: float
    arms: tuple[Arm, ...]

    @property
    def setting(self) -> str:
        """The name of the setting, "SUITE/K=5/T=0"."""
        return setting_key(self.suite.name, self.k, self.temperature)

    @property
    def seeds(self) -> tuple[int, ...]:
        """With which every arm runs, in order."""
        return self.ablation.document.seeds


def load_arms(ablation: Ablation) -> Contest:
    """Loads the recipe of each arm with each seed; nothing heavy is imported for it.

    Raises:
        RecipeError: carries the problems of all arms; those that the base has are reported once.
    """
    base, problems = _load(ablation, BASE)
    faults = [_placed(ablation, BASE, problem) for problem in problems]
    choice = _setting(ablation, base.recipe) if base else None
    faults += [choice] if isinstance(choice, Problem) else []
    arms = [base] if base else []
    for name in ablation.document.variants:
        arm, own = _load(ablation, name)
        if arm and base and isinstance(choice, tuple):
            own += _other_measurement(base.recipe, arm.recipe, *choice)
        faults += [_placed(ablation, name, problem) for problem in own if problem not in problems]
        arms += [arm] if arm else []
    if faults or not isinstance(choice, tuple):
        raise RecipeError(faults)
    suite, k, temperature = choice
    return Contest(ablation=ablation, suite=suite, k=k, temperature=temperature, arms=tuple(arms))


def in_variant(ablation: Ablation, arm: str, message: str, hint: str = "") -> Problem:
    """Reports a problem of an arm as a whole, at its line in the file."""
    parts: tuple[Part, ...] = ("recipe",) if arm == BASE else ("variants", arm)
    return ablation.problem(parts, path_text(parts), message, hint)


def _load(ablation: Ablation, arm: str) -> tuple[Arm | None, list[Problem]]:
    """Loads an arm, or finds all its problems."""
    options = ablation.options(arm)
    try:
        table = overrides_table(options)
        if fixed := [key for key in FIXED if key in table]:
            return None, [Problem(key, "cannot be set in an ablation", FIXED[key]) for key in fixed]
        recipes = {seed: _with_seed(ablation, options, seed) for seed in ablation.document.seeds}
    except RecipeError as error:
        return None, list(error.problems)
    made = Arm(name=arm, options=ablation.document.variants.get(arm, ()), recipes=recipes)
    problems = check_recipe(made.recipe)
    return (None if problems else made), problems


def _with_seed(ablation: Ablation, options: Sequence[str], seed: int) -> Recipe:
    folder = ablation.path.parent
    recipe = load_recipe(ablation.recipe, options, folder=folder)
    # A run with the recipe's own seed is the run that `spec run` makes, and is shared with it.
    return recipe if recipe.seed == seed else load_recipe(ablation.recipe, [*options, f"seed={seed}"], folder=folder)


def _placed(ablation: Ablation, arm: str, problem: Problem) -> Problem:
    """Moves a problem to the line of its arm, and says where it lies in the recipe."""
    if arm == BASE and problem.file is not None:
        return problem
    shared = arm == BASE and ablation.document.set
    parts: tuple[Part, ...] = ("set",) if shared else ("recipe",) if arm == BASE else ("variants", arm)
    own = ":".join(str(part) for part in (problem.file, problem.line) if part is not None)
    message = ": ".join(filter(None, (own, problem.path, problem.message)))
    return ablation.problem(parts, path_text(parts), message, problem.hint)


def _setting(ablation: Ablation, base: Recipe) -> tuple[Suite, int, float] | Problem:
    """Finds the setting that decides among those that the base measures."""
    section = base.benchmark
    settings = {
        setting_key(suite.name, k, temperature): (suite, k, temperature)
        for suite in section.suites
        for temperature in sorted(section.temperatures)
        for k in sorted(section.num_speculative_tokens, reverse=True)
    }
    if not settings:
        return in_variant(ablation, BASE, "measures no acceptance: it names no suite", "set benchmark.suites")
    chosen = ablation.setting or next(iter(settings))
    if chosen not in settings:
        hint = near_miss(chosen, list(settings)) or f"available: {', '.join(settings)}"
        return ablation.problem(("setting",), "setting", f"{chosen} is not measured by the base", hint)
    return settings[chosen]


def _other_measurement(base: Recipe, variant: Recipe, suite: Suite, k: int, temperature: float) -> list[Problem]:
    """Finds what makes the tau of a variant another number than that of the base, in the setting that decides."""
    ours, theirs = base.benchmark, variant.benchmark
    if not (k in theirs.num_speculative_tokens and temperature in theirs.temperatures and suite in theirs.suites):
        message = f"must measure {setting_key(suite.name, k, temperature)}, which decides"
        return [Problem("benchmark", message, "leave it as in the base")]
    keys = ("top_p", "top_k", "min_p", "verification", "max_new_tokens")
    differing = {
        **{f"benchmark.{key}": getattr(ours, key) != getattr(theirs, key) for key in keys},
        "verifier": base.verifier != variant.verifier,
    }
    hint = "the difference must come from the drafts alone"
    return [Problem(path, "must be that of the base", hint) for path, differs in differing.items() if differs]
