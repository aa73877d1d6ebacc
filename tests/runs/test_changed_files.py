"""`spec show --why` names the local data files that differ from what the finished run of a recipe read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from speculators.cli import main
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_path
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.runs.changed_files import newest_finished
from speculators.runs.places import RUNS, RunFolder
from speculators.runs.recipes import keep_recipe

FACTS = Path(__file__).parents[1] / "fixtures" / "smollm2-135m" / "config.json"
ROW = '{"messages": []}\n'
ONE, TWO = (hashlib.sha256((ROW * count).encode()).hexdigest()[:8] for count in (1, 2))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that reads one file, all of a folder and a suite of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    for name in ("rows.jsonl", "parts/a.jsonl", "parts/b.jsonl", "suite.jsonl"):
        (tmp_path / name).write_text(ROW)
    source = '"data/quickstart.jsonl", split = "train", take = 24'
    recipe = recipe_path("smoke").read_text().replace('"smoke"', '"mine"', 1).replace(source, '"rows.jsonl"')
    Path("mine.toml").write_text(recipe)


def finished(name: str = "mine-1", *, minutes_ago: int = 0, overrides: tuple[str, ...] = ()) -> RunFolder:
    """Writes what is left of a run whose training ended."""
    run = RunFolder(RUNS / name)
    run.path.mkdir(parents=True)
    sources = 'data.sources=[{path="rows.jsonl"}, {path="parts"}]'
    suites = 'benchmark.suites=[{name="mine", path="suite.jsonl"}]'
    recipe = load_recipe("mine.toml", (sources, suites, *overrides))
    keep_recipe(run, make_plan(recipe, VerifierFacts.read(FACTS)))
    run.trained.write_text("{}")
    ended = run.trained.stat().st_mtime - 60 * minutes_ago
    os.utime(run.trained, (ended, ended))
    return run


def changed(capsys: pytest.CaptureFixture[str], place: str, key: str) -> dict[str, list[str]]:
    """The changed files that `--why` lists, by key."""
    assert main(["show", place, "--why", key, "--json"]) == 0
    return {path: why["changed"] for path, why in json.loads(capsys.readouterr().out).items() if why["changed"]}


def test_files_that_are_as_they_were_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a change, and without a run, nothing is said."""
    assert main(["show", "mine.toml", "--why", "data"]) == 0
    assert "changed" not in capsys.readouterr().out
    run = finished()
    assert changed(capsys, str(run.path), "data") == {}


def test_the_changed_file_is_named_with_both_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    """One file, a file of a folder, a new one, a missing one and a suite's are distinguished."""
    run = finished()
    Path("rows.jsonl").write_text(ROW * 2)
    Path("parts/b.jsonl").write_text(ROW * 3)
    Path("parts/c.jsonl").write_text(ROW)
    Path("parts/a.jsonl").unlink()
    Path("suite.jsonl").unlink()
    lines = changed(capsys, str(run.path), "data")
    assert set(lines) == {"data.sources[0].path", "data.sources[1].path"}
    (line,) = lines["data.sources[0].path"]
    assert line == f"rows.jsonl has sha256 {TWO}; mine-1 read it with {ONE}"
    assert [each.partition(";")[0].split(" with ")[0].split(" has ")[0] for each in lines["data.sources[1].path"]] == [
        "a.jsonl is missing",
        "b.jsonl",
        "c.jsonl is new since mine-1",
    ]
    (suite,) = changed(capsys, str(run.path), "benchmark")["benchmark.suites[0].path"]
    assert suite.startswith("suite.jsonl is missing; mine-1 read it with sha256 ")
    assert main(["show", str(run.path), "--why", "data.sources"]) == 0
    assert "rows.jsonl has sha256" in capsys.readouterr().out


def test_a_recipe_is_compared_with_its_newest_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of other recipes, and runs that did not finish, do not count."""
    finished("mine-1", minutes_ago=2)
    Path("rows.jsonl").write_text(ROW * 2)
    finished("mine-2", minutes_ago=1)
    finished("other", overrides=('name="other"',))
    finished("mine-3").trained.unlink()
    assert newest_finished("mine", RUNS) == RunFolder(RUNS / "mine-2")
    Path("rows.jsonl").write_text(ROW)
    (line,) = changed(capsys, "mine.toml", "data.sources")["data.sources[0].path"]
    assert line == f"rows.jsonl has sha256 {ONE}; mine-2 read it with {TWO}"


def test_only_files_below_the_key_are_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a learning rate hashes no data."""
    run = finished()
    monkeypatch.setattr("speculators.runs.changed_files.source_identity", lambda source: 1 // 0)
    assert changed(capsys, str(run.path), "schedule") == {}
