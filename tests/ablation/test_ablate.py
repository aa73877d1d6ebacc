"""`spec ablate` end to end on `smoke`: ordinary runs, made once, and one table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from command import Outcome, Spec

from speculators.ablation import runs as ablation_runs
from speculators.ablation.result import AblationResult
from speculators.structure.converter import structure

SMALL = """format = 1
recipe = "smoke"
seeds = [0, 1]
set = ["schedule.max_steps=2", "schedule.evaluate_every=2", "benchmark.baselines=[]", "benchmark.live_prompts=1"]
[variants]
"fast" = ["schedule.optimizer.lr=3e-2"]
"1 depth" = ["algorithm.ttt_steps=1"]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The command line with folders that this module's tests share, and the file of an ablation in its home."""
    lab = Spec(tmp_path_factory.mktemp("lab"))
    (lab.home / "small.toml").write_text(SMALL)
    return lab


def ablate(lab: Spec, *arguments: object, name: str = "small.toml") -> Outcome:
    return lab("ablate", lab.home / name, "--runs", lab.runs, *arguments)


@pytest.fixture(scope="module")
def outcome(lab: Spec) -> Outcome:
    """The outcome of the first call."""
    return ablate(lab)


@pytest.fixture
def folder(lab: Spec) -> Path:
    return lab.runs / "ablations" / "small"


def test_the_first_call_makes_every_run_and_ends_in_the_table(lab: Spec, outcome: Outcome) -> None:
    """Seed by seed, with a table of the first seed on the way; the base comes first, and the stages are shared."""
    assert outcome.code == 0, outcome.err
    began = [line.rpartition(": ")[2] for line in outcome.err.splitlines() if line.startswith("ablation small: run ")]
    assert began == [f"{arm}, seed {seed}" for seed in (0, 1) for arm in ("base", "fast", "1 depth")]
    assert outcome.err.count("capture done in") == 1
    assert outcome.err.count("suite done in") == 1
    assert "4 prompts, 1 seed (0)" in outcome.err
    assert "compared over" not in outcome.err
    assert "3 runs have not ended" in outcome.err
    assert "ablation small  quickstart/K=3/T=0, 4 prompts, 2 seeds (0, 1)" in outcome.out
    header, base, *_ = outcome.out.splitlines()[1:]
    assert header.split()[:2] == ["variant", "tau"]
    assert base.startswith("base ")
    assert "over all 2 variants together (Holm)" in outcome.out
    listed = {run["name"] for run in lab("ls", "--runs", lab.runs, "--json").json["runs"]}
    assert len(listed) == 6


def test_the_second_call_makes_nothing(
    lab: Spec, outcome: Outcome, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the same result from the runs on disk, which is what the folder holds."""
    monkeypatch.setattr(ablation_runs, "run_recipe", lambda *_, **__: pytest.fail("a run was made again"))
    again = ablate(lab, "--json", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert again.json == json.loads((folder / "ablation.json").read_text())
    result, problems = structure(again.json, AblationResult)
    assert problems == []
    assert result.arms[0].name == "base"
    assert sum(arm.difference is not None for arm in result.arms) == 2
    assert all(Path(seed.run).is_dir() for arm in result.arms for seed in arm.seeds)


def test_the_folder_holds_table_and_plot(lab: Spec, outcome: Outcome, folder: Path) -> None:
    """Markdown with what each variant changes, and a picture that needs no style sheet."""
    table = (folder / "table.md").read_text()
    assert "| variant | tau |" in table
    assert "* fast: `schedule.optimizer.lr=3e-2`" in table
    pytest.importorskip("matplotlib", reason="pip install 'spec-recipes[report]'")
    plot = (folder / "plot.svg").read_text()
    assert plot.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "var(--" not in plot
    assert "fast" in plot


def test_a_run_of_the_base_is_a_run_of_the_recipe(lab: Spec, outcome: Outcome) -> None:
    """`spec run` with the same options finds everything done."""
    plan = ablate(lab, "--plan", "--json").json
    assert all(run["stages"]["bench"] for run in plan["runs"])
    # The file lies in another folder, where the command first goes: its options may name files.
    start, _, line = plan["runs"][0]["command"].partition(" && ")
    assert start == f"cd {lab.home}"
    _, verb, *arguments = shlex.split(line)
    alone = lab(verb, *arguments)
    assert alone.code == 0
    assert alone.err.count("already done:") == 5


def test_the_plan_shows_what_is_done_and_what_is_shared(lab: Spec, outcome: Outcome) -> None:
    """Another seed has its training left to do, on conversations and states that are there; nothing is run."""
    planned = ablate(lab, "--plan", "--seeds", 0, 7)
    assert planned.code == 0
    assert "6 runs, 3 to do" in planned.out
    rows = [line.split() for line in planned.out.splitlines()]
    assert [row[-2:] for row in rows if row[:2] == ["base", "7"]] == [["no", "no"]]
    assert [row[-2:] for row in rows if row[0:1] == ["capture"]] == [["yes", "all"]]
    assert "as the runs that are done took" in planned.out
    assert len(list(lab.runs.glob("smoke-*"))) == 6


def test_one_seed_is_plainly_said_to_be_one(lab: Spec, outcome: Outcome) -> None:
    """Its intervals are over prompts alone, and nothing is marked."""
    single = ablate(lab, "--seeds", 1)
    assert single.code == 0
    assert "1 seed (1)" in single.out
    assert "intervals over prompts only" in single.out
    assert "Holm" not in single.out
    ablate(lab)  # leaves the folder as the other tests read it


def test_a_variant_that_fails_is_reported_and_the_others_go_on(lab: Spec, outcome: Outcome) -> None:
    """The exit code is 1, the table names it, and the next call tries it again."""
    text = SMALL.replace("[variants]", '[variants]\n"wild" = ["schedule.optimizer.lr=1e30", "schedule.max_steps=3"]')
    (lab.home / "failing.toml").write_text(text)
    for _ in range(2):
        failing = ablate(lab, name="failing.toml")
        assert failing.code == 1
        assert "ablation failing: run 2 of 2: wild, seed 1" in failing.err
        assert "Traceback" not in failing.err
        row = next(line for line in failing.out.splitlines() if line.startswith("wild "))
        assert row.split() == ["wild", "failed"]
        assert "wild, seed 0 failed: " in failing.out
        assert "over all 2 variants together" in failing.out


def test_ctrl_c_resumes(lab: Spec, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how, and the runs that were done by then are not made again."""
    real, made = ablation_runs.run_recipe, []

    def interrupted(*arguments: object, **options: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(ablation_runs, "run_recipe", interrupted)
    stopped = ablate(lab, "--seeds", 5)
    assert stopped.code == 130
    assert f"to go on: spec ablate {lab.home / 'small.toml'} --runs {lab.runs} --seeds 5" in stopped.err
    monkeypatch.setattr(ablation_runs, "run_recipe", real)
    resumed = ablate(lab, "--seeds", 5)
    assert resumed.code == 0
    assert "run 1 of 1: 1 depth, seed 5" in resumed.err


def test_a_bug_in_one_run_does_not_lose_the_night(lab: Spec, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run raises becomes its failure, with the traceback on stderr."""
    monkeypatch.setattr(ablation_runs, "run_recipe", lambda *_, **__: [][0])
    failing = ablate(lab, "--seeds", 0, 6)
    assert failing.code == 1
    assert failing.err.count("Traceback") == 3
    assert "base, seed 6 failed: IndexError: list index out of range" in failing.out
    assert "compared over fewer seeds: " in failing.out


def test_several_processes_are_refused(lab: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how a cluster makes the runs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = ablate(lab)
    assert refused.code == 2
    assert "--plan --json prints the command of each run" in refused.err
