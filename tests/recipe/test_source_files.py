"""What of local data enters the fingerprint, how paths are read, and how a changed file is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from speculators.diff.compare import compare
from speculators.diff.side import DiffSide
from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.checks import check_recipe
from speculators.recipe.fingerprint import source_identity
from speculators.recipe.input_sections import DataSource
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.relocate import relocate
from speculators.recipe.schema import Recipe

Write = Callable[..., str]


@pytest.fixture
def convs(tmp_path: Path) -> Path:
    """A folder of two files, which the recipe of `planned` trains on."""
    folder = tmp_path / "convs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"messages": [1]}\n')
    (folder / "sub" / "b.jsonl").write_text('{"messages": [2]}\n')
    return folder


def source(recipe: Recipe) -> DataSource:
    return recipe.data.sources[0]


def with_path(path: str, **keys: str) -> str:
    return f"data.sources=[{{ path = '{path}'{''.join(f', {key} = {value}' for key, value in keys.items())} }}]"


def prepared(plan: Plan) -> str:
    return plan.stage("prepare").fingerprint


def test_the_content_of_a_folder_enters_the_fingerprint(write: Write, convs: Path, llama: VerifierFacts) -> None:
    """Not its name: an edit, a new file and another order are noticed, another place is not."""
    path = write()

    def planned(place: str) -> str:
        return prepared(make_plan(load_recipe(path, [with_path(place)]), llama))

    before = planned("./convs")
    convs.rename("other")
    assert planned("./other") == before
    file = Path("other", "a.jsonl")
    file.write_text('{"messages": [3]}\n')
    edited = planned("./other")
    Path("other", "c.jsonl").write_text("{}\n")
    more = planned("./other")
    Path("other", "c.jsonl").rename("other/0.jsonl")
    assert len({before, edited, more, planned("./other")}) == 4


def test_one_file_is_identified_by_its_content_alone(tmp_path: Path) -> None:
    """As in every lock so far."""
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    digest = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert source_identity(DataSource(path=str(file))) == {"sha256": digest, "split": None, "take": None}


def test_a_map_enters_the_fingerprint(write: Write, llama: VerifierFacts) -> None:
    """Other fields are other conversations; without a map nothing moves."""
    path = write()
    plans = [
        make_plan(load_recipe(path, [with_path("rows.jsonl", **keys)]), llama)
        for keys in ({}, {"map": "{text='t'}"}, {"map": "{text='u'}"}, {"map": "'none'"})
    ]
    assert len({prepared(plan) for plan in plans}) == 3
    assert prepared(plans[0]) == prepared(plans[3])
    assert plans[1].inputs()["prepare"]["sources"][0]["map"] == {"text": "t"}


@pytest.mark.parametrize(
    "written", ["convs", "./convs", "{folder}/convs", "~/convs", "convs/*.jsonl", "./co*/**/*.jsonl"]
)
def test_paths_of_folders_work_as_those_of_files_do(
    write: Write, convs: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """They start from the recipe's folder, wherever the command runs."""
    sources = f'[{{ path = "{written.format(folder=convs.parent)}" }}]'
    path = Path(write(('[{ path = "rows.jsonl" }]', sources))).absolute()
    monkeypatch.setenv("HOME", str(convs.parent))
    (convs.parent / "elsewhere" / "convs").mkdir(parents=True)
    monkeypatch.chdir(convs.parent / "elsewhere")
    files = source_identity(source(load_recipe(str(path))))["files"]
    assert "a.jsonl" in " ".join(files)


def test_a_folder_named_like_a_hub_id_is_read_and_said(write: Write, convs: Path) -> None:
    """Neither is chosen silently: ./ says the folder, a revision says the hub."""
    path = write()
    recipe = load_recipe(path, [with_path("convs")])
    assert source(recipe).path == str(convs)
    (note,) = recipe.notes
    assert "is read as the folder" in note
    assert "./convs" in note
    assert load_recipe(path, [with_path("./convs")]).notes == ()
    hub = load_recipe(path, [with_path("convs", revision="'abc'")])
    assert (source(hub).path, hub.notes) == ("convs", ())


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ({"path": "./absent"}, "path", "no such file or folder"),
        ({"path": "*.parquet"}, "path", "no file matches"),
        ({"path": "./convs", "sha256": f"'{'0' * 64}'"}, "sha256", "for one file"),
        ({"path": "./convs", "revision": "'abc'"}, "revision", "for data sets of the hub"),
        ({"path": "owner/name", "sha256": f"'{'0' * 64}'"}, "sha256", "pinned by its revision"),
        ({"path": "rows.jsonl", "map": "{prompt='q'}"}, "map.prompt", "needs completion"),
    ],
)
def test_what_cannot_be_read_is_a_problem_of_the_recipe(
    write: Write, convs: Path, keys: dict[str, str], key: str, said: str
) -> None:
    """It is reported with the line before anything is fetched or loaded."""
    recipe = load_recipe(write(), [with_path(**keys)])
    problems = {problem.path: problem.message for problem in check_recipe(recipe)}
    assert said in problems[f"data.sources[0].{key}"]


def test_a_home_of_nobody_is_a_problem(write: Write) -> None:
    """Not a traceback."""
    with pytest.raises(RecipeError, match=r"data.sources\[0\].path: ~nobody-here/x.jsonl"):
        load_recipe(write(), [with_path("~nobody-here/x.jsonl")])


def test_a_comparison_names_the_file_that_changed(write: Write, convs: Path, llama: VerifierFacts) -> None:
    """In the value that differs, and as the reason why the stage runs again."""
    path = write()

    def side(name: str) -> DiffSide:
        recipe = load_recipe(path, [with_path("./convs")])
        return DiffSide.of_recipe(name, recipe, make_plan(recipe, llama))

    before = side("before")
    (convs / "sub" / "b.jsonl").write_text("{}\n")
    comparison = compare(before, side("after"))
    (change,) = comparison.changes
    assert "sub/b.jsonl" in change.before
    assert "a.jsonl" not in f"{change.before}{change.after}"
    (because,) = next(stage.because for stage in comparison.stages if stage.stage == "prepare")
    assert because.startswith("sources[0].files.sub/b.jsonl")


def test_a_lock_finds_a_moved_folder_by_its_content(
    write: Write, convs: Path, llama: VerifierFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And names the file that is not the lock's."""
    recipe = load_recipe(write(), [with_path("./convs")])
    lock: Any = attrs.make_class("Lock", ["inputs"])(make_plan(recipe, llama).inputs())
    (convs.parent / "new").mkdir()
    convs.rename(convs.parent / "new" / "convs")
    monkeypatch.chdir(convs.parent / "new")
    moved, missing = relocate(recipe, lock, convs.parent / "run")
    assert (source(moved).path, missing) == (str(convs.parent / "new" / "convs"), [])
    Path("convs/a.jsonl").write_text("{}\n")
    Path("convs/c.jsonl").write_text("{}\n")
    (lost,) = relocate(recipe, lock, convs.parent / "run")[1]
    assert "its content has changed: a.jsonl with sha256 ca3d163b" in str(lost)
    assert "no c.jsonl" in str(lost)
    assert "sub/b.jsonl" not in str(lost)
