"""`spec lock --check` confirms that the shipped recipes still mean what their locks say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Spec

from speculators.recipe import catalog, lock_check


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec(tmp_path)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped recipes, in their usual place, that a test may change."""
    folder = Path(shutil.copytree(catalog.recipes_folder(), tmp_path / "recipes"))
    for module in ("catalog", "load", "lock_check", "shipped"):
        monkeypatch.setattr(f"speculators.recipe.{module}.recipes_folder", lambda: folder)
    return folder


def test_every_shipped_recipe_resolves_to_its_lock(spec: Spec) -> None:
    """The check needs no network; a changed default, data file or suite would change the meaning of a recipe."""
    result = spec("lock", "--check", "--json")
    assert result.code == 0, result.out
    assert [each["name"] for each in result.json] == catalog.recipe_names()
    assert all(each["problems"] == [] for each in result.json)


def test_a_changed_recipe_is_named_by_stage_and_value(spec: Spec, recipes: Path) -> None:
    """The error has both values and the remedy; writing the same value differently changes nothing."""
    file = recipes / "smoke.toml"
    file.write_text(file.read_text().replace("lr = 1e-3", "lr = 0.0010"))
    assert spec("lock", "--check", "smoke").code == 0
    file.write_text(file.read_text().replace("lr = 0.0010", "lr = 2e-3"))
    result = spec("lock", "--check", "smoke")
    assert result.code == 1
    assert "train: schedule.optimizer.lr is 0.001 in the lock but 0.002 now" in result.out
    assert "raise the version" in result.out


def test_changed_data_is_named_by_its_hash(spec: Spec, recipes: Path) -> None:
    """The hash is reported under the stage that reads the data."""
    with (recipes / "data" / "quickstart.jsonl").open("a") as file:
        file.write("\n")
    result = spec("lock", "--check", "quickstart")
    assert result.code == 1
    assert "prepare: sources[0].sha256" in result.out


def test_an_intended_change_gets_a_new_lock(spec: Spec, recipes: Path) -> None:
    """`--write` uses the config.json that the locks already contain: nothing is downloaded."""
    file = recipes / "quickstart.toml"
    file.write_text(file.read_text().replace("seed     = 0", "seed     = 7"))
    assert spec("lock", "--check", "quickstart").code == 1
    assert spec("lock", "--write", "quickstart").code == 0
    assert spec("lock", "--check", "quickstart").code == 0
    # The recipes that extend it changed with it, and keep their old locks.
    assert spec("lock", "--check", "quickstart_mtp", "smoke").code == 1
    assert spec("lock", "--check", "smoke").code == 0
    assert json.loads((recipes / lock_check.NAME).read_text())["recipes"]["quickstart"]["inputs"]["train"]["seed"] == 7


@pytest.mark.parametrize(
    "arguments", [("--check", "nope"), ("--write", "nope"), (), ("--check", "."), ("--check", "./x")]
)
def test_bad_usage_is_one_error(
    spec: Spec, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown name, a missing action and a folder that is not a run exit with 2."""
    monkeypatch.chdir(tmp_path)
    result = spec("lock", *arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
