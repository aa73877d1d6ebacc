"""Data that is edited while a run works is never stored under the fingerprint of the data before the edit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import Spec

from speculators.pipeline.context import Context
from speculators.recipe.catalog import recipes_folder


@pytest.mark.parametrize("regenerate", ["none", "{max_new_tokens=2}"], ids=["prepared", "regenerated"])
def test_a_file_edited_after_the_plan_stops_the_run(
    fresh: Spec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, regenerate: str
) -> None:
    """The run names the file and stores nothing; the next one works with the file as it is."""
    rows = Path(shutil.copyfile(recipes_folder() / "data" / "quickstart.jsonl", tmp_path / "rows.jsonl"))
    value = f'"{regenerate}"' if regenerate == "none" else regenerate
    arguments = ["--set", f'data.sources=[{{path="{rows}", split="train", take=4}}]', "--set", "schedule.max_steps=1"]
    arguments += ["--set", f"data.regenerate={value}", "--set", 'benchmark.suites=[{name="quickstart", take=1}]']

    def edit(context: object) -> None:
        rows.write_text(rows.read_text() + "\n")

    with monkeypatch.context() as patch:
        patch.setattr("speculators.pipeline.run.try_verifier", edit)
        outcome = fresh.run(*arguments)
    assert outcome.code == 1
    assert f"{rows}: changed after the plan was made" in outcome.err
    assert "run the command again" in outcome.err
    assert fresh.half_written() == list((fresh.cache / "conversations").glob("[0-9a-f]*")) == []
    assert not list((fresh.cache / "regenerated").glob("*.jsonl"))
    assert fresh.run(*arguments).code == 0


def test_a_suite_edited_during_training_is_not_benchmarked(
    fresh: Spec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The benchmark reads its prompts hours after the plan; with the former file back, it is all that is left to do."""
    rows = Path(shutil.copyfile(recipes_folder() / "data" / "quickstart.jsonl", tmp_path / "rows.jsonl"))
    suite = f'{{name="mine", path="{rows}", split="test", take=1}}'
    arguments = ["--set", "schedule.max_steps=1", "--set", f'benchmark.suites=[{{name="quickstart", take=1}}, {suite}]']
    text, emit = rows.read_text(), Context.emit

    def editing(self: Context, event: object) -> None:
        if getattr(event, "stage", "") == "train":
            rows.write_text(text + "\n")
        emit(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "emit", editing)
        outcome = fresh.run(*arguments)
    assert outcome.code == 1
    assert f"{rows}: changed after the plan was made" in outcome.err
    assert not list(fresh.runs.glob("*/bench/*.json"))
    rows.write_text(text)
    outcome = fresh.run(*arguments)
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.err.splitlines() if "already done:" in line][-1] == "train"
