"""`spec bench RUN RUN`: what runs hold is compared, and only what they lack is measured."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from command import Spec

from speculators.bench.result import BenchResult, definition
from speculators.pipeline.measure import SavedSpeculator
from speculators.recipe.schema import BenchmarkSection
from speculators.structure.converter import structure

Sections = list[tuple[str, BenchmarkSection]]


def copy(run: Path, folder: Path) -> Path:
    """Copies a run with the benchmark of its own recipe alone."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("asked-*.json", "checkpoints"))
    return folder


@pytest.fixture
def own(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the smoke run under another recipe's name."""
    return copy(run_folder, tmp_path / "own-12345678")


@pytest.fixture
def other(run_folder: Path, tmp_path: Path) -> Path:
    """A second copy."""
    return copy(run_folder, tmp_path / "other-12345678")


def bench_file(run: Path) -> Path:
    (file,) = (run / "bench").glob("*.json")
    return file


@pytest.fixture
def sections(own: Path, monkeypatch: pytest.MonkeyPatch) -> Sections:
    """Collects (run, section) of every measurement, which answers with the smoke run's numbers."""
    result, _ = structure(json.loads(bench_file(own).read_text()), BenchResult)
    assert result is not None
    asked: Sections = []

    def measure(subject: SavedSpeculator, section: BenchmarkSection, *, progress: Callable[..., None]) -> BenchResult:
        asked.append((subject.name, section))
        settings = [
            attrs.evolve(setting, temperature=t, definition=definition(setting.num_speculative_tokens, t))
            for t in section.temperatures
            for setting in result.settings
        ]
        return attrs.evolve(result, settings=tuple(settings), fingerprint=None)

    monkeypatch.setattr("speculators.pipeline.bench_several.measure_folder", measure)
    return asked


def test_what_runs_hold_is_not_measured_again(spec: Spec, own: Path, other: Path, sections: Sections) -> None:
    """The same numbers in both: no difference is shown."""
    outcome = spec("bench", own, other, "--json")
    assert (outcome.code, sections) == (0, [])
    document = outcome.json
    assert [each["name"] for each in document["speculators"]] == ["own", "other"]
    settings = [result["settings"] for each in document["speculators"] for result in each["results"]]
    assert settings[0] == settings[1]
    assert set(settings[0][0]["counts_by_prompt"]) == set(settings[0][0]["by_prompt"])
    (difference,) = [
        each["difference"]
        for each in document["differences"]
        if (each["speculator"], each["num_speculative_tokens"]) == ("other", 3)
    ]
    assert (difference["mean"], difference["shown"], difference["prompts"]) == (0, False, 4)


def test_only_what_is_lacking_is_measured_and_then_filed(
    spec: Spec, own: Path, other: Path, sections: Sections
) -> None:
    """Another temperature, and everything for a run without a benchmark; the second time nothing is left."""
    bench_file(other).unlink()
    arguments = ("bench", own, other, "--temperature", "0", "--temperature", "1")
    first = spec(*arguments, "--csv")
    assert [(name, section.temperature) for name, section in sections] == [(own.name, (1.0,)), (other.name, (0.0, 1.0))]
    rows = list(csv.DictReader(io.StringIO(first.out)))
    shown = [(row["speculator"], row["temperature"], row["K"]) for row in rows if not row["baseline"]]
    assert shown == [(name, t, k) for t in ("0.0", "1.0") for name in ("own", "other") for k in ("1", "3")]
    sections.clear()
    assert spec(*arguments, "--csv").out == first.out
    assert sections == []


def test_only_baselines_that_are_asked_for_are_listed(spec: Spec, own: Path, other: Path, sections: Sections) -> None:
    """The table does not depend on what else was measured before."""
    plan = json.loads((own / "plan.json").read_text())
    plan["recipe"]["benchmark"]["baselines"] = []
    (own / "plan.json").write_text(json.dumps(plan))
    assert "ngram" not in spec("bench", own, other, "--csv").out
    assert ",ngram," in spec("bench", other, own, "--csv").out
    assert sections == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompts", "2"),
        ("--verifier", "tiny:0"),
        ("--live", "1"),
        ("--against", "suffix"),
        ("--suite", "untemplated"),
    ],
)
def test_another_measurement_is_made(
    spec: Spec, own: Path, other: Path, sections: Sections, arguments: tuple[str, ...]
) -> None:
    """Fewer prompts, another verifier, more live decoding, a baseline or a suite that no run has."""
    assert spec("bench", own, other, *arguments, "--quiet").code == 0
    assert [name for name, _ in sections] == [own.name, other.name]


def test_a_damaged_benchmark_is_named_before_it_is_measured_again(
    spec: Spec, own: Path, other: Path, sections: Sections
) -> None:
    """Nobody wonders why minutes pass."""
    bench_file(other).write_text("{")
    outcome = spec("bench", own, other)
    assert "is left out: it is damaged" in outcome.err
    assert "bench other on quickstart" in outcome.err
    assert [name for name, _ in sections] == [other.name]


def test_a_disagreement_in_any_run_is_a_failure(spec: Spec, own: Path, other: Path, sections: Sections) -> None:
    """The exit code is that of one run's benchmark."""
    document = json.loads(bench_file(other).read_text())
    document["settings"][0]["live"]["agreement"]["gap"] = "prompt 3"
    bench_file(other).write_text(json.dumps(document))
    assert spec("bench", own, other).code == 1
    assert sections == []


MISUSES: dict[str, tuple[tuple[str, ...], str]] = {
    "twice the same": (("{run}", "{run}"), "a run is named twice"),
    "two ledgers": (("{run}", "{other}", "--ledger"), "--ledger: of one run at a time"),
    "two details": (("{run}", "{other}", "--details"), "--details: of one run at a time"),
    "two forms": (("{run}", "--csv", "--md"), "not allowed with argument --csv"),
    "JSON as CSV": (("{run}", "--csv", "--json"), "--csv: not together with --json"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_options_that_would_be_ignored_are_refused(
    spec: Spec, own: Path, other: Path, sections: Sections, misuse: str
) -> None:
    """Exit code 2, and nothing is measured."""
    arguments, message = MISUSES[misuse]
    outcome = spec("bench", *(each.format(run=own, other=other) for each in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert sections == []


def test_one_run_has_the_same_forms(spec: Spec, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured, as always; its rows are those of the table."""
    result, _ = structure(json.loads(bench_file(own).read_text()), BenchResult)
    monkeypatch.setattr("speculators.pipeline.measure.measure_folder", lambda *_, **__: result)
    filed: list[Any] = []
    monkeypatch.setattr("speculators.runs.benches.file_bench", lambda *values: filed.append(values))
    lines = spec("bench", own, "--md").out.splitlines()
    assert [line.split(" | ")[2] for line in lines[2:6]] == [own.name, own.name, "ngram", "ngram"]
    assert len(filed) == 1
