"""Runs are found by their folder, their name, or a beginning that no other has; shipped recipes keep their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.errors import ArtifactError, RecipeError
from speculators.recipe.catalog import recipe_path
from speculators.runs.places import RunFolder, find_recipe, find_run, find_speculator

NAMES = ("mine-11111111", "mine-22222222", "mine_too-33333333", "smoke-44444444", "smoke_long-55555555")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with five runs, and a folder beside them that is not one."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text("{}")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("runs/mine-11111111", "mine-11111111"),
        ("mine-11111111", "mine-11111111"),
        ("mine-1", "mine-11111111"),
        ("mine_", "mine_too-33333333"),
        ("smoke", "smoke-44444444"),
    ],
)
def test_a_run_is_found_by_path_name_or_beginning(runs: Path, text: str, name: str) -> None:
    """The runs of a recipe come before those whose longer names begin alike."""
    assert find_run(text).path.resolve() == runs / name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "is the beginning of 2 runs: mine-11111111, mine-22222222"),
        ("mime-11111111", "did you mean 'mine-11111111'?"),
        ("runs/notes", "is not a run"),
        ("elsewhere/mine-11111111", "there is no such run"),
    ],
)
def test_what_is_not_one_run_is_bad_usage(runs: Path, text: str, message: str) -> None:
    """Several runs are listed, and a near miss is named; every verb exits with 2 for it."""
    with pytest.raises(RecipeError, match=r"mine|notes") as caught:
        find_run(text)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_shipped_recipe_comes_before_a_run_of_its_name(runs: Path) -> None:
    """`spec run smoke` stays the recipe whatever ran before; a path, or more of the name, means the run."""
    assert find_recipe("smoke") == recipe_path("smoke")
    for text in ("runs/smoke-44444444", "smoke-4"):
        assert find_recipe(text) == RunFolder(Path("runs/smoke-44444444"))
    Path("mine.toml").write_text("")
    assert find_recipe("mine.toml") == Path("mine.toml")
    with pytest.raises(RecipeError, match="is the beginning of 2 runs"):
        find_recipe("mine")
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        find_recipe("quickstrt")


def test_a_speculator_is_found_in_a_run_named_briefly(runs: Path) -> None:
    """A run that has not ended its training is a failure, not bad usage: what was named exists."""
    with pytest.raises(ArtifactError, match="it has no speculator yet"):
        find_speculator(Path("mine-1"))
    speculator = runs / "mine-11111111" / "speculator"
    speculator.mkdir()
    (speculator / "config.json").write_text("{}")
    assert find_speculator(Path("mine-1")).resolve() == speculator
    assert find_speculator(speculator) == speculator
    with pytest.raises(RecipeError, match="neither a run with a speculator nor a speculator"):
        find_speculator(Path("runs/notes"))
