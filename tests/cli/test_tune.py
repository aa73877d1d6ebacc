"""`spec tune` measures a run, files its choice there, and `spec export` takes it over."""

from __future__ import annotations

import shutil
from pathlib import Path

from command import Spec

from speculators.runs.tunings import known_taus, read_tuning


def test_tuning_a_run_sets_the_k_of_its_exports(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """Every K has its tau, cost and prediction, the best few a measurement; the run holds them from now on."""
    run = tmp_path / run_folder.name
    shutil.copytree(run_folder, run)
    outcome = spec("tune", run, "--k-max", "3", "--measure", "2", "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json["candidates"]
    assert [row["num_speculative_tokens"] for row in rows] == [1, 2, 3]
    assert sum(row["measured"] is not None for row in rows) == 2
    for row in rows:
        assert row["predicted"] == row["tau"] / row["cost"]
    tuning = read_tuning(run).in_process
    assert tuning is not None
    assert known_taus(run, tuning.suite, 0.0) == {row["num_speculative_tokens"]: row["tau"] for row in rows} | {
        k: tau for k, tau in known_taus(run_folder, tuning.suite, 0.0).items() if k > 3
    }
    exported = spec("export", run, "--to", "vllm", "--json")
    assert exported.code == 0, exported.err
    assert exported.json["num_speculative_tokens"] == tuning.best.num_speculative_tokens
    assert exported.json["why_k"] == "the fastest that spec tune found in process"


def test_options_of_the_other_kind_of_measurement_are_refused(spec: Spec, run_folder: Path) -> None:
    """An option that would be ignored is an error, and so is a server without its baseline."""
    ignored = spec("tune", run_folder, "--limit", "8")
    assert (ignored.code, "--limit: only for running servers" in ignored.err) == (2, True)
    url = ("--endpoint", "http://127.0.0.1:1")
    alone = spec("tune", run_folder, *url, "--k-max", "3")
    assert alone.code == 2
    assert "--k-max: measured in process only" in alone.err
    assert "--endpoint needs --baseline-endpoint" in alone.err
