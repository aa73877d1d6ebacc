"""Data that is edited while a run works is never stored under the fingerprint of the data before the edit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import Spec

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
