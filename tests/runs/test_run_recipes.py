"""A run keeps the recipe that it ran: running that file, or the run, again is the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.algorithm import remember_plugin
from speculators.recipe.catalog import recipe_names, recipe_path, recipes_folder
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.shipped import shipped_facts
from speculators.recipe.values import flatten
from speculators.recipe.written import effective_text
from speculators.runs.places import RunFolder
from speculators.runs.recipes import changed_values, keep_recipe, load_any, load_run, recipe_text

FACTS = Path(__file__).parents[1] / "fixtures" / "smollm2-135m" / "config.json"
CHANGES = (
    "seed=1",
    "schedule.optimizer.lr=1e-4",
    'schedule.optimizer.clip_norm="none"',
    'benchmark.suites=[{name="quickstart", take=4}]',
    "algorithm.decoder={rms_norm_eps=1e-6}",
)


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(recipe, VerifierFacts.read(FACTS))


def kept(recipe: Recipe, folder: Path) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    keep_recipe(run, plan_of(recipe))
    return run


def mine(folder: Path) -> Path:
    """Writes a recipe with comments, which extends another file and has data beside it."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"messages": []}\n')
    base = recipe_path("smoke").read_text().replace("data/quickstart.jsonl", "rows.jsonl").replace('"train"', '"x"')
    (folder / "base.toml").write_text(base)
    (folder / "mine.toml").write_text(
        'format = 1\nname = "mine"\nversion = "1.0.0"\nextends = "./base.toml"\n'
        '[expect]\n"quickstart/K=3/T=0" = { tau = [1, 2], source = "a \\"guess\\"" }\n'
    )
    return folder / "mine.toml"


@pytest.mark.parametrize("changes", [(), CHANGES], ids=["as written", "changed"])
@pytest.mark.parametrize("which", ["smoke", "quickstart_dflash", "mine"])
def test_the_kept_recipe_alone_is_the_same_run(tmp_path: Path, which: str, changes: tuple[str, ...]) -> None:
    """Whatever came from the command line, from another file or from beside the recipe: all fingerprints are equal."""
    name = str(mine(tmp_path / "far")) if which == "mine" else which
    recipe = load_recipe(name, changes)
    again = load_recipe(str(kept(recipe, tmp_path / "runs" / "run").recipe))
    assert plan_of(again).fingerprints() == plan_of(recipe).fingerprints()
    values, before = flatten(again), flatten(recipe)
    assert values.pop("extends") is None
    before.pop("extends")
    assert values == before


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_be_spelled_anew(tmp_path: Path, name: str) -> None:
    """With a seed of its own each shipped recipe becomes a file that means the same; its data keeps a relative path."""
    recipe = load_recipe(name, ["seed=7"])
    file = tmp_path / "recipe.toml"
    file.write_text(effective_text(recipe, file, {"seed": 7}))
    facts = shipped_facts(recipe.verifier)
    assert facts is not None or name == "smoke"
    facts = facts or VerifierFacts.read(FACTS)
    assert make_plan(load_recipe(str(file)), facts).fingerprints() == make_plan(recipe, facts).fingerprints()
    assert str(recipes_folder()) not in file.read_text()


def test_the_authors_text_is_kept_where_it_says_it_all(tmp_path: Path) -> None:
    """Comments survive unless the command line, or another file, changed the meaning; what changed is in a comment."""
    plain = kept(load_recipe("smoke"), tmp_path / "a")
    assert plain.recipe.read_text() == recipe_path("smoke").read_text() == recipe_text(plain)
    changed = kept(load_recipe("smoke", ["seed=1", "schedule.optimizer.lr=2e-4"]), tmp_path / "b").recipe.read_text()
    assert changed.splitlines()[:4] == [
        "# The effective recipe of this run: smoke (smoke.toml).",
        "# Changed on the command line:",
        "#   seed = 1",
        "#   schedule.optimizer.lr = 0.0002",
    ]


def test_a_run_goes_on_with_its_changes_and_remembers_where_they_came_from(tmp_path: Path) -> None:
    """Resumed from its folder, a run is the same run; what its first command line changed is still listed."""
    run = kept(load_recipe("smoke", ["seed=1"]), tmp_path / "runs" / "smoke-1")
    recipe, resumed = load_any(str(run.path))
    assert (recipe.seed, resumed) == (1, run)
    text = run.recipe.read_text()
    keep_recipe(run, plan_of(load_run(run, ["benchmark.live_prompts=1"])))
    assert changed_values(run) == {"seed": 1, "benchmark.live_prompts": 1}
    keep_recipe(run, plan_of(load_run(run)))
    assert changed_values(run) == {"seed": 1, "benchmark.live_prompts": 1}
    assert run.recipe.read_text() != text
    assert "#   seed = 1\n" in run.recipe.read_text()


def test_a_run_of_an_older_version_goes_on_with_its_overrides(tmp_path: Path) -> None:
    """It kept its author's file without --set; its plan has what really ran."""
    run = kept(load_recipe("smoke", ["seed=1"]), tmp_path / "old")
    run.recipe.write_bytes(recipe_path("smoke").read_bytes())
    plan = json.loads(run.plan.read_text())
    del plan["recipe_sha256"]
    run.plan.write_text(json.dumps(plan))
    assert plan_of(load_run(run)).fingerprints() == plan_of(load_recipe("smoke", ["seed=1"])).fingerprints()
    assert "#   seed = 1\n" in recipe_text(run)
    keep_recipe(run, plan_of(load_run(run)))
    assert load_recipe(str(run.recipe)).seed == 1
    assert changed_values(run) == {"seed": 1}


def test_a_recipe_that_was_edited_in_its_run_is_refused(tmp_path: Path) -> None:
    """Neither the edit nor the run is silently ignored."""
    run = kept(load_recipe("smoke", ["seed=1"]), tmp_path / "run")
    run.recipe.write_text(run.recipe.read_text().replace("seed = 1", "seed = 2"))
    with pytest.raises(RecipeError, match="was edited since this run"):
        load_run(run)


def test_a_run_remembers_where_its_plugin_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder the run's recipe still finds the module, which is neither installed nor beside it."""
    for name in ("first", "elsewhere", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "somewhere_else.py").write_text("FOUND = True\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "first")])
    __import__("somewhere_else")
    remember_plugin("somewhere_else", tmp_path / "run")
    sys.path.pop()
    del sys.modules["somewhere_else"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    from speculators.recipe.algorithm import import_plugin

    import_plugin("somewhere_else", tmp_path / "run")
    assert sys.modules.pop("somewhere_else").FOUND
