"""`spec report` on the run that the pipeline made."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Spec

pytest.importorskip("matplotlib", reason="pip install 'spec-recipes[report]'")


def test_a_real_run_becomes_a_page(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """Nothing is missing; the file is complete and at the path of --out, and the run is unchanged."""
    out, before = tmp_path / "page.html", sorted(run_folder.iterdir())
    outcome = spec("report", run_folder, "--out", out)
    assert (outcome.code, outcome.out) == (0, f"{out}\n"), outcome.err
    text = out.read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    assert f"<title>{run_folder.name}</title>" in text
    for phrase in ("Exact tau during training", "Tau by category", "quickstart, K=3, T=0"):
        assert phrase in text
    assert sorted(run_folder.iterdir()) == before


def test_against_a_parent_the_page_has_both_and_stands_in_the_run(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """The report is written into the run's own folder; differences are relative to the parent."""
    outcome = spec(
        "run", "smoke", "--runs", tmp_path, "--set", "schedule.max_steps=1", "--set", "benchmark.suites=[]", "--json"
    )
    child = Path(outcome.json["run"])
    outcome = spec("report", child, "--against", run_folder, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["report"] == str(child / "report.html")
    assert outcome.json["missing"][run_folder.name] == []
    assert outcome.json["missing"][child.name][0].startswith("the recipe names no suite")
    text = (child / "report.html").read_text(encoding="utf-8")
    assert f"<h3>{run_folder.name} → {child.name}</h3>" in text
    assert "0.125 times the updates" in text
    assert "<b>not comparable</b>" in text


def test_reruns_do_not_stop_a_report_of_all_runs(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """`spec report runs/*` also names the folders of `spec reproduce`: they are left out, and the output says so."""
    rerun = tmp_path / "smoke-reproduced"
    rerun.mkdir()
    (rerun / "reproduces.json").write_text("{}")
    outcome = spec("report", run_folder, rerun, "--out", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    assert "smoke-reproduced: left out: a re-run" in outcome.out


def test_a_folder_without_a_run_is_an_error_without_a_traceback(spec: Spec, tmp_path: Path) -> None:
    """The command exits with 2 and names the command that lists runs."""
    outcome = spec("report", tmp_path)
    assert outcome.code == 2
    assert "not a run: it has neither plan.json nor events.jsonl" in outcome.err
    assert "Traceback" not in outcome.err
