"""How a recipe lets the verifier sample: filters of its own, or the verifier's generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from speculators.diff.comparability import comparability
from speculators.diff.side import DiffSide
from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.values import as_tables

MODEL = 'benchmark.temperature="model"'


@pytest.fixture
def plan_of(write: Callable[..., str], llama: VerifierFacts) -> Callable[..., Plan]:
    path = write()

    def plan(*overrides: str, facts: VerifierFacts = llama) -> Plan:
        return make_plan(load_recipe(path, overrides), facts)

    return plan


@pytest.fixture
def says(tmp_path: Path, llama: VerifierFacts) -> Callable[..., VerifierFacts]:
    """Makes a verifier whose generation config has these values."""

    def make(**values: object) -> VerifierFacts:
        shutil.copy(llama.folder / "config.json", tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **values}))
        return VerifierFacts.read(tmp_path / "config.json")

    return make


def stages(plan: Plan, other: Plan) -> list[str]:
    """The stages whose fingerprints differ."""
    theirs = other.fingerprints()
    return [name for name, digest in plan.fingerprints().items() if digest != theirs[name]]


@pytest.mark.parametrize("filters", ["top_p=0.9", "top_k=20", "min_p=0.1", 'verification="block"'])
def test_a_filter_or_another_rule_enters_what_samples(plan_of, filters):
    """It changes the benchmark and, through the choice of the best checkpoint, training; no data and no states."""
    plain = plan_of("benchmark.temperature=[1.0]")
    changed = plan_of("benchmark.temperature=[1.0]", f"benchmark.{filters}")
    assert stages(plain, changed) == ["train", "bench"]
    greedy_first = ("benchmark.temperature=[0.0, 1.0]", f"benchmark.{filters}")
    assert stages(plan_of(greedy_first[0]), plan_of(*greedy_first)) == ["bench"]


def test_the_verifiers_own_sampling_becomes_numbers(plan_of, says):
    """The plan, and so plan.json and the lock, has them; it is the plan of a recipe that states them itself."""
    facts = says(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0)
    own = plan_of(MODEL, facts=facts)
    table = as_tables(own.recipe)["benchmark"]
    assert (table["temperature"], table["top_p"], table["top_k"], table["min_p"]) == ((0.6,), 0.95, 20, None)
    stated = plan_of("benchmark.temperature=[0.6]", "benchmark.top_p=0.95", "benchmark.top_k=20", facts=facts)
    assert own.fingerprints() == stated.fingerprints()


def test_values_that_restrict_nothing_are_no_filter(plan_of, says):
    """A file with filters alone means temperature 1, as servers take it; one with temperature 0 is greedy."""
    benchmark = plan_of(MODEL, facts=says(top_p=1.0, top_k=-1, min_p=0.2)).recipe.benchmark
    assert (benchmark.temperature, str(benchmark.token_filter)) == ((1.0,), "min_p=0.2")
    benchmark = plan_of(MODEL, facts=says(temperature=0, top_k=50)).recipe.benchmark
    assert (benchmark.temperature, str(benchmark.token_filter)) == ((0.0,), "")


def test_the_rule_of_verification_stays_where_the_verifier_chooses_the_rest(plan_of, says):
    """Unless the verifier's own sampling is greedy: then there is nothing to choose, and the recipe must not say so."""
    block = 'benchmark.verification="block"'
    assert plan_of(MODEL, block, facts=says(temperature=0.6)).recipe.benchmark.block_verification
    with pytest.raises(RecipeError, match="verification: greedy decoding does not sample"):
        plan_of(MODEL, block, facts=says(temperature=0))


def test_the_default_rule_changes_no_fingerprint(plan_of):
    """Runs from before there was a choice are found again."""
    sampled = "benchmark.temperature=[1.0]"
    named = plan_of(sampled, 'benchmark.verification="token"')
    assert named.fingerprints() == plan_of(sampled).fingerprints()
    assert "verification" not in named.stage("bench").inputs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "generation_config.json says nothing of temperature"),
        ({"temperature": "hot"}, "must be a list of numbers"),
        ({"temperature": 1.0, "top_k": 2.5}, "must be an integer"),
    ],
)
def test_a_verifier_that_does_not_say_is_an_error_with_a_remedy(plan_of, says, values, message):
    """Nothing is guessed in its place."""
    with pytest.raises(RecipeError, match=message):
        plan_of(MODEL, facts=says(**values))


def test_a_verifier_without_the_file_is_an_error_with_a_remedy(plan_of, says, llama):
    """Absent beside config.json, or unknown where config.json came from elsewhere."""
    facts = says()
    (facts.folder / "generation_config.json").unlink()
    with pytest.raises(RecipeError, match=r"does not exist .write the numbers: temperature = \[0\.6\]"):
        plan_of(MODEL, facts=facts)
    with pytest.raises(RecipeError, match=r"only the config\.json is known.*--verifier-config"):
        plan_of(MODEL, facts=VerifierFacts(llama.to_dict(), "locks.json"))


def test_bands_are_checked_against_the_resolved_temperature(write, says):
    """Loading cannot know it; the plan does."""
    band = 'expect={{"held/K=3/T={}" = {{tau=[1.0, 2.0], source="a run"}}}}'
    facts, path = says(temperature=0.6), write()
    assert make_plan(load_recipe(path, [MODEL, band.format("0.6")]), facts).recipe.benchmark.temperatures == (0.6,)
    with pytest.raises(RecipeError, match=r"is not a setting that \[benchmark\] measures"):
        make_plan(load_recipe(path, [MODEL, band.format("0.7")]), facts)


def test_the_unresolved_recipe_has_no_numbers_to_give(write):
    """Whoever needs them before the plan gets an error that says what to write."""
    with pytest.raises(RecipeError, match="must be numbers here"):
        _ = load_recipe(write(), [MODEL]).benchmark.temperatures


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("top_p=0.9", "the verifier's top_p differ (None / 0.9)"),
        ('verification="block"', "drafts are verified by different rules (token / block)"),
    ],
)
def test_results_that_were_sampled_differently_do_not_compare(plan_of, key, reason):
    """The reason names the key and both values."""
    recipes = [plan_of("benchmark.temperature=[1.0]", *more) for more in ((), (f"benchmark.{key}",))]
    one, other = (DiffSide.of_recipe(name, plan.recipe, plan) for name, plan in zip("ab", recipes, strict=True))
    comparable, reasons = comparability(one, other)
    assert comparable is False
    assert reasons == (reason,)
