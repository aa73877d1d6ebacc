"""`spec diff`: meaning, not spelling; what is invalidated; whether results compare; runs with their numbers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from command import Spec

from speculators.bench.statistics import bootstrap_difference
from speculators.report.diff import sparkline

ONE = """\
format = 1
name = "one"
version = "1.0.0"
extends = "smoke"
[schedule]
max_steps = 3
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The command, with a home that the tests of this file share."""
    return Spec(tmp_path_factory.mktemp("diff"))


@pytest.fixture(scope="module")
def runs(spec: Spec) -> dict[str, str]:
    """Two runs of smoke that differ in the learning rate, and one with another suite length."""
    sets = {
        "plain": (),
        "faster": ("--set", "schedule.optimizer.lr=5e-3"),
        "shorter": ("--set", "benchmark.suites=[{name='quickstart', take=3}]"),
    }
    found = {}
    for name, arguments in sets.items():
        told = spec.run(*arguments, "--json")
        assert told.code == 0, told.err
        found[name] = told.json["run"]
    return found


def test_spelling_is_no_difference(spec: Spec, tmp_path: Path) -> None:
    """Underscores, order, comments, a default written out, and the recipe's name mean nothing."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE + "tokens_per_step = 1_024\nrow_tokens = 512\n")
    text = ONE.replace('name = "one"', 'name = "other"').replace("max_steps = 3\n", "")
    other.write_text(
        text + "row_tokens = 512   # the same\ntokens_per_step = 1024\nmax_steps = 3\nkeep_checkpoints = 2\n"
    )
    told = spec("diff", one, other)
    assert told.code == 0, told.out + told.err
    assert "no difference in meaning" in told.out


def test_a_change_tells_both_values_origins_and_consequence(spec: Spec, tmp_path: Path) -> None:
    """Where each was written, and what it means; exit 1."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE)
    other.write_text(ONE.replace("max_steps = 3", "max_steps = 6") + "[algorithm]\ndraft_vocab_size = 256\n")
    told = spec("diff", one, other, "--json")
    assert told.code == 1
    found = {change["path"]: change for change in told.json["changes"]}
    assert set(found) == {"schedule.max_steps", "algorithm.draft_vocab_size"}
    steps = found["schedule.max_steps"]
    assert (steps["before"], steps["after"], steps["consequence"]) == (3, 6, "2 times the updates")
    assert steps["before_from"].endswith("one.toml:6")
    vocabulary = found["algorithm.draft_vocab_size"]
    assert vocabulary["before_from"].startswith("extends")
    assert vocabulary["after_from"].endswith("other.toml:8")


def test_stages_and_verdict_need_the_verifiers_config(spec: Spec, tmp_path: Path, tiny_verifier: Path) -> None:
    """With it: another objective trains and measures anew, the states are reused, and results compare."""
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(ONE)
    other.write_text(ONE + '[algorithm]\nname = "eagle3"\nttt_steps = 2\n')
    told = spec("diff", one, other, "--verifier-config", tiny_verifier / "config.json", "--json").json
    assert {stage["stage"]: stage["status"] for stage in told["stages"]} == {
        "verifier": "reused",
        "prepare": "reused",
        "capture": "reused",
        "train": "runs again",
        "bench": "runs again",
    }
    assert told["comparable"] is True


def test_runs_tell_metrics_paired_by_prompt_and_curves(spec: Spec, runs: dict[str, str]) -> None:
    """The same prompts: a difference of tau with an interval around it."""
    told = spec("diff", runs["plain"], runs["faster"], "--json").json
    assert [change["path"] for change in told["changes"]] == ["schedule.optimizer.lr"]
    assert told["comparable"] is True
    assert {row["num_speculative_tokens"] for row in told["metrics"]} == {1, 3}
    for row in told["metrics"]:
        low, high = row["interval"]
        assert low <= row["after"] - row["before"] <= high
    assert len(told["curves"]["a"]["loss"]) == len(told["curves"]["b"]["loss"]) == 8
    assert told["environment"] == {}


def test_other_prompts_do_not_compare(spec: Spec, runs: dict[str, str]) -> None:
    """The verdict names both suites; no metric is set beside another."""
    told = spec("diff", runs["plain"], runs["shorter"], "--json").json
    assert told["comparable"] is False
    assert "the suites differ (quickstart@" in told["reasons"][0]
    assert told["metrics"] == []


def test_a_run_equals_itself(spec: Spec, runs: dict[str, str]) -> None:
    """Exit 0, every stage reused."""
    told = spec("diff", runs["plain"], runs["plain"], "--json")
    assert told.code == 0
    assert {stage["status"] for stage in told.json["stages"]} == {"reused"}


def test_markdown_is_for_a_pull_request(spec: Spec, runs: dict[str, str]) -> None:
    """A table, the stages, the verdict."""
    told = spec("diff", runs["plain"], runs["faster"], "--md")
    assert "| `schedule.optimizer.lr` |" in told.out
    assert "| train | runs again | schedule.optimizer.lr 0.001 -> 0.005 |" in told.out
    assert "**results compare**" in told.out
    assert "<br><sub>--set</sub>" in told.out
    assert told.out.count("* `loss, ") == 2
    assert "* `tau, " in told.out


def test_a_git_revision_of_a_recipe(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REV:path reads the file as it was, with what it extends beside it as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    base, mine = tmp_path / "recipes" / "base.toml", tmp_path / "recipes" / "mine.toml"
    base.write_text(ONE)
    mine.write_text('format = 1\nname = "mine"\nversion = "1.0.0"\nextends = "./base.toml"\n')
    # One level of extending: the base is written out.
    base.write_text((Path(__file__).parents[2] / "recipes" / "smoke.toml").read_text())
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    assert spec("diff", "HEAD:recipes/mine.toml", "recipes/mine.toml").code == 0
    mine.write_text(mine.read_text() + "seed = 7\n")
    told = spec("diff", "HEAD:recipes/mine.toml", "recipes/mine.toml", "--json")
    assert [(change["path"], change["after"]) for change in told.json["changes"]] == [("seed", 7)]


@pytest.mark.parametrize(
    ("a", "words"),
    [("no-such", "no-such"), ("HEAD~999:recipes/x.toml", "git"), ("nowhere:recipes/x.toml", "git")],
)
def test_what_is_not_there_is_one_error(spec: Spec, a: str, words: str) -> None:
    """Exit 2, never a traceback."""
    told = spec("diff", a, "smoke")
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    """Prompts differ more than two models do on each of them: pairing takes that out. Seeded."""
    generator = np.random.default_rng(0)
    rounds = generator.uniform(20, 60, 50)
    tau = generator.uniform(1.2, 2.6, 50)
    before, after = (np.stack([rounds * (tau + gain), rounds], 1) for gain in (0.0, 0.05))
    low, high = bootstrap_difference(before, after)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)


def test_a_sparkline_tells_its_ends() -> None:
    """Falling values fall."""
    line = sparkline([4.0, 3.0, 2.0, 1.0])
    assert line == "4.000 █▆▃▁ 1.000"
