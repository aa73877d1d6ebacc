"""`spec lock --check`: the recipes that come with the package still mean what their locks say."""

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
    """A copy of the shipped recipes in their place, to change."""
    folder = Path(shutil.copytree(catalog.recipes_folder(), tmp_path / "recipes"))
    for module in ("catalog", "load", "lock_check"):
        monkeypatch.setattr(f"speculators.recipe.{module}.recipes_folder", lambda: folder)
    return folder


def test_every_shipped_recipe_resolves_to_its_lock(spec: Spec) -> None:
    """Offline: a default, a data file or a suite that changed would change what a recipe means; exit 0."""
    told = spec("lock", "--check", "--json")
    assert told.code == 0, told.out
    assert [each["name"] for each in told.json] == catalog.recipe_names()
    assert all(each["problems"] == [] for each in told.json)


def test_a_changed_recipe_is_named_by_stage_and_value(spec: Spec, recipes: Path) -> None:
    """Both values, and what to do; a recipe that says the same in other words resolves."""
    file = recipes / "smoke.toml"
    file.write_text(file.read_text().replace("lr = 1e-3", "lr = 0.0010"))
    assert spec("lock", "--check", "smoke").code == 0
    file.write_text(file.read_text().replace("lr = 0.0010", "lr = 2e-3"))
    told = spec("lock", "--check", "smoke")
    assert told.code == 1
    assert "train: schedule.optimizer.lr is 0.001 in the lock but 0.002 now" in told.out
    assert "raise the version" in told.out


def test_changed_data_is_named_by_its_hash(spec: Spec, recipes: Path) -> None:
    """In the stage that reads it."""
    with (recipes / "data" / "quickstart.jsonl").open("a") as file:
        file.write("\n")
    told = spec("lock", "--check", "quickstart")
    assert told.code == 1
    assert "prepare: sources[0].sha256" in told.out


def test_a_wanted_change_is_locked_anew(spec: Spec, recipes: Path) -> None:
    """`--write` from the config.json that is in the locks already: nothing is fetched."""
    file = recipes / "quickstart.toml"
    file.write_text(file.read_text().replace("seed     = 0", "seed     = 7"))
    assert spec("lock", "--check", "quickstart").code == 1
    assert spec("lock", "--write", "quickstart").code == 0
    assert spec("lock", "--check", "quickstart").code == 0
    # What extends it changed with it, and is not locked anew by the way.
    assert spec("lock", "--check", "quickstart_mtp", "smoke").code == 1
    assert spec("lock", "--check", "smoke").code == 0
    assert json.loads((recipes / lock_check.NAME).read_text())["recipes"]["quickstart"]["inputs"]["train"]["seed"] == 7


@pytest.mark.parametrize(
    "arguments", [("--check", "nope"), ("--write", "nope"), (), ("--check", "."), ("--check", "./x")]
)
def test_bad_usage_is_one_error(
    spec: Spec, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is nothing, no action, a folder that is no run: exit 2."""
    monkeypatch.chdir(tmp_path)
    told = spec("lock", *arguments)
    assert told.code == 2
    assert "Traceback" not in told.err
