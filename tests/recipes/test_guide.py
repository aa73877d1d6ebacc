"""recipes/README.md: its commands parse, and its examples are recipes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tomli

from speculators.cli import verb_parser
from speculators.recipe.catalog import recipes_folder
from speculators.recipe.checks import check_recipe
from speculators.recipe.input_sections import DataSource
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import BenchmarkSection
from speculators.structure.converter import structure

GUIDE = (recipes_folder() / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]
TOML = [block for kind, block in BLOCKS if kind == "toml"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the parser of its verb, as far as `--`, beside a config.json."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    program, verb, *arguments = shlex.split(command, comments=True)
    assert program == "spec"
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    verb_parser(verb)[1].parse_args(arguments)


def test_the_examples_are_valid(tmp_path: Path) -> None:
    """One extends a recipe, one is complete; the band names a setting of the complete one."""
    child, whole, sources, suites, band = TOML
    assert structure(tomli.loads(suites), BenchmarkSection)[1] == []
    tables = tomli.loads(sources)["data"]["sources"]
    assert [structure(table, DataSource)[1] for table in tables] == [[], []]
    for name, text in (("child", child), ("whole", whole + band)):
        (tmp_path / f"{name}.toml").write_text(text)
        recipe = load_recipe(str(tmp_path / f"{name}.toml"))
        assert check_recipe(recipe) == []
    assert load_recipe(str(tmp_path / "child.toml")).schedule.epochs == 3
    assert set(tomli.loads(band)["expect"]) == set(recipe.expect)
