"""Recipes are row by name in the package, or by path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli

from speculators.bench.referee import FEWEST_PROMPTS
from speculators.errors import RecipeError
from speculators.recipe import algorithm, field_map, input_sections, schema
from speculators.recipe.catalog import recipe_names, recipe_path, recipes_folder
from speculators.recipe.load import load_recipe


def test_the_catalogue_has_the_recipes_of_the_package() -> None:
    """A recipe's name is its file name without the ending."""
    assert {"quickstart", "smoke", "eagle3_llama8b", "eagle3_qwen3_8b", "smollm2_eagle3"} <= set(recipe_names())
    assert recipe_path("smoke").name == "smoke.toml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quikstart", "did you mean 'quickstart'?"),
        ("xyz", "available: "),
        ("./quickstart.toml", "spec cp quickstart ./quickstart.toml"),
        ("./other.toml", "spec ls"),
    ],
)
def test_an_unknown_recipe_gets_the_near_miss(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a name, the closest name; for a path, the command that would make the file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        recipe_path(name)
    assert hint in str(caught.value)


def test_a_path_needs_a_slash_or_the_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine.toml` and `./mine.toml` are files; `smoke` is always the recipe of the catalogue."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("")
    Path("smoke").write_text("")
    assert recipe_path("mine.toml") == Path("mine.toml")
    assert recipe_path("smoke").suffix == ".toml"


def test_the_guide_names_every_recipe_and_every_key() -> None:
    """A new key of the schema, or a new recipe in the folder, must be added to recipes/README.md."""
    guide = (recipes_folder() / "README.md").read_text(encoding="utf-8")
    modules = (algorithm, field_map, input_sections, schema)
    names = {module.__name__ for module in modules}
    values = [value for module in modules for value in vars(module).values()]
    sections = [value for value in values if isinstance(value, type) and attrs.has(value) and value.__module__ in names]
    keys = {field.name for section in sections for field in attrs.fields(section)}
    keys -= {"config", "file", "origins", "notes"}
    assert [word for word in [*sorted(keys), *recipe_names()] if word not in guide] == []


@pytest.mark.parametrize(
    ("key", "section"), [("server", input_sections.StatesServerSection()), ("regenerate", input_sections.Regenerate())]
)
def test_the_guides_tables_hold_the_defaults(key: str, section: Any) -> None:
    """Every key of an inline table, with its default."""
    guide = (recipes_folder() / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{key}` \|.*?a table `(.+?)`", guide, re.MULTILINE)
    assert row is not None
    values = {name: None if value == "none" else value for name, value in tomli.loads(f"a = {row[1]}")["a"].items()}
    assert values == json.loads(json.dumps(attrs.asdict(section)))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_confirms_as_many_prompts_as_its_criterion_needs(name: str) -> None:
    """Above T = 0, and in 16 bits, live and replay are compared over prompts, of which a few tell nothing."""
    recipe = load_recipe(name)
    section = recipe.benchmark
    sampled = any(temperature > 0 for temperature in section.temperature) or recipe.verifier.dtype != "float32"
    assert not sampled or section.live_prompts is None or section.live_prompts >= FEWEST_PROMPTS
