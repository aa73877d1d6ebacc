"""Formats of the file: older ones are migrated step by step, others are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from speculators.errors import RecipeError
from speculators.recipe.document import MIGRATIONS, migrate
from speculators.recipe.load import load_recipe


def rename_depth(document: dict[str, Any]) -> dict[str, Any]:
    """An artificial format 0 said `algorithm.depth` for what format 1 calls `algorithm.ttt_steps`."""
    algorithm = dict(document["algorithm"])
    algorithm["ttt_steps"] = algorithm.pop("depth")
    return {**document, "algorithm": algorithm}


def test_an_older_format_is_migrated_on_load(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of format 0 loads as one of format 1."""
    monkeypatch.setitem(MIGRATIONS, 0, rename_depth)
    path = write(("format = 1", "format = 0"), ("draft_vocab_size = 64", "depth = 5"))
    recipe = load_recipe(path)
    assert recipe.format == 1
    assert recipe.algorithm.config.ttt_steps == 5


def test_migrations_run_one_after_the_other() -> None:
    """From 0 to 2 both steps run, in order, on a copy."""
    original = {"format": 0, "trail": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIGRATIONS, 0, lambda d: {**d, "trail": [*d["trail"], "0->1"]})
        patch.setitem(MIGRATIONS, 1, lambda d: {**d, "trail": [*d["trail"], "1->2"]})
        assert migrate(original, to=2) == {"format": 2, "trail": ["0->1", "1->2"]}
    assert original == {"format": 0, "trail": []}


def test_a_newer_format_is_refused_with_what_reads_it(write: Callable[..., str]) -> None:
    """The message names this program's version, what it reads, and what to install."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(("format = 1", "format = 2")))
    (problem,) = caught.value.problems
    assert problem.path == "format"
    assert problem.file == "mine.toml"
    assert f"spec-recipes {metadata.version('spec-recipes')} reads formats up to 1" in problem.message
    assert "reads format 2" in problem.hint


@pytest.mark.parametrize("line", ["", 'format = "1"', "format = true", "format = 0"])
def test_a_missing_or_unreadable_format_is_one_problem(write: Callable[..., str], line: str) -> None:
    """No format, a text, a truth value, and a format without a migration."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(("format = 1", line)))
    assert [problem.path for problem in caught.value.problems] == ["format"]
