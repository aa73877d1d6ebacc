"""`spec reproduce` makes a run again from its lock, in folders of its own, killed or not, here or elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from command import WEIGHTS, Outcome, Spec, events
from forked import spawn
from tampering import differing

from speculators.events import Event, StepEvent
from speculators.files.disk import file_sha256
from speculators.report.progress import RunView

STAGES = ["verifier", "prepare", "capture", "train", "bench"]


def test_a_run_is_reproduced_bit_for_bit(kept: Path, first: Outcome) -> None:
    """Data, states, every loss, checkpoints, weights and benchmark have the same bits: exit 0."""
    assert first.code == 0, first.out + first.err
    assert first.json["reproduced"]
    assert first.json["tolerance"] is None
    assert first.json["environment"] == []
    checks = [(finding["stage"], finding["check"]) for finding in first.json["findings"]]
    assert [stage for stage in STAGES if stage in dict(checks)] == STAGES
    assert {check for stage, check in checks if stage == "train"} == {
        *("inputs", "updates", "evaluations", "checkpoints", "chosen", "weights", "config.json")
    }
    assert {finding["result"] for finding in first.json["findings"]} == {"same"}


def test_nothing_of_the_run_is_taken_over(kept: Path, to: Path, first: Outcome) -> None:
    """Conversations, states and weights are made in the re-run's own folders; the run is untouched."""
    (again,) = (to / "runs").iterdir()
    done = [event["stage"] for event in events(again, "StageEvent") if event["status"] == "done"]
    assert [stage for stage in STAGES if stage in done] == STAGES[1:]
    assert {folder.name for folder in (to / "cache").iterdir()} == {"conversations", "locks", "states"}
    assert (again / WEIGHTS).stat().st_ino != (kept / WEIGHTS).stat().st_ino
    assert json.loads(to.with_name("first.json").read_text()) == first.json


def test_the_log_keeps_every_bit_of_a_loss(run_folder: Path) -> None:
    """The log writes each loss as the shortest text that reads back to the same number."""
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    losses = [re.search(r'"loss": ([^,]+),', line).group(1) for line in lines if '"StepEvent"' in line]
    assert len(losses) >= 8
    assert all(repr(float(text)) == text and len(text) > 12 for text in losses)


def test_the_recipe_of_the_lock_is_run_and_not_the_file(spec: Spec, run: Path, to: Path) -> None:
    """The re-run ignores the recipe file, which may have changed."""
    (run / "recipe.toml").write_text("format = 99\n")
    assert spec("reproduce", run, "--to", to, "--quiet").code == 0


def test_a_run_that_is_measured_at_other_k_since_is_reproduced(spec: Spec, run: Path, tmp_path: Path) -> None:
    """A K below the largest is not an input of training, so the log, written when 1 was among them, compares equal."""
    outcome = spec("run", "smoke", "--runs", run.parent, "--set", "benchmark.num_speculative_tokens=[3, 2]")
    assert "train already done" in outcome.err, outcome.err
    again = spec("reproduce", run, "--to", tmp_path / "to", "--json")
    assert again.code == 0, again.out + again.err
    assert again.json["reproduced"]
    (evaluations,) = [finding for finding in again.json["findings"] if finding["check"] == "evaluations"]
    assert evaluations["result"] == "same"


def test_a_table_by_stage_ends_in_the_verdict(spec: Spec, run: Path, to: Path) -> None:
    """The table has stage, check, result and evidence; a finished re-run is only compared."""
    outcome = spec("reproduce", run, "--to", to)
    assert outcome.code == 0
    assert "train already done" in outcome.err
    assert re.search(r"train +updates +same +8 updates", outcome.out)
    assert outcome.out.splitlines()[-1].startswith("reproduced to the same bits")


def test_a_killed_and_resumed_run_is_reproduced(spec: Spec, fresh: Spec, first: Outcome) -> None:
    """After kill -9 between updates, the last record of an update counts, and the earlier one equals it."""
    assert spawn(fresh.home, "between updates") == -signal.SIGKILL
    resumed = fresh.run()
    assert resumed.code == 0, resumed.err
    (run,) = fresh.runs.iterdir()
    assert [event["step"] for event in events(run, "StepEvent")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    outcome = fresh("reproduce", run, "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["tolerance"] is None
    repeated = [finding for finding in outcome.json["findings"] if finding["check"] == "repeated updates"]
    assert [(finding["result"], finding["evidence"][:1]) for finding in repeated] == [("same", "1")]
    lines = (run / "events.jsonl").read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if '"step": 5' in line)
    other = json.loads(lines[place])
    lines[place] = json.dumps({**other, "loss": other["loss"] + 0.5})
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    outcome = fresh("reproduce", run, "--json")
    assert differing(outcome) == [("train", "repeated updates")]
    assert outcome.json["first"]["step"] == 5
    assert outcome.json["first"]["by"] == pytest.approx(0.5)


def test_ctrl_c_leaves_a_folder_that_a_second_call_goes_on_from(
    spec: Spec, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C exits with 130; the second call makes the rest, with the same bits."""
    render, pressed = RunView.__call__, []

    def press(self: RunView, event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 2 and not pressed:
            pressed.append(event)
            os.kill(os.getpid(), signal.SIGINT)
        render(self, event)

    monkeypatch.setattr(RunView, "__call__", press)
    outcome = spec("reproduce", kept, "--to", tmp_path / "to")
    assert outcome.code == 130, outcome.err
    assert outcome.err.splitlines()[-1] == "interrupted"
    outcome = spec("reproduce", kept, "--to", tmp_path / "to", "--json")
    assert outcome.code == 0, outcome.out
    assert "capture already done" in outcome.err
    (again,) = (tmp_path / "to" / "runs").iterdir()
    assert [event["step"] for event in events(again, "StepEvent")] == list(range(1, 9))


def test_an_input_is_obtained_by_its_hash(spec: Spec, first: Outcome, tmp_path: Path) -> None:
    """A data file is located beside the run if it moved, and refused with both hashes if its content changed."""
    data = tmp_path / "data" / "mine.jsonl"
    data.parent.mkdir()
    shipped = Path(__file__).parents[2] / "recipes" / "data" / "quickstart.jsonl"
    lines = [line for line in shipped.read_text().splitlines(keepends=True) if '"split": "train"' in line]
    data.write_text("".join(lines[:8]))
    sources = f"data.sources=[{{path='{data}'}}]"
    runs = tmp_path / "runs"
    made = spec("run", "smoke", "--runs", runs, "--set", sources, "--set", "schedule.max_steps=1", "--json")
    assert made.code == 0, made.err
    run = Path(made.json["run"])
    locked = file_sha256(data)
    data.rename(run / data.name)
    again = spec("reproduce", run, "--to", tmp_path / "to", "--until", "prepare", "--json")
    assert again.code == 0, again.out + again.err
    assert spec("lock", "--check", run).code == 0
    (run / data.name).write_text("".join(lines[1:9]))
    outcome = spec("reproduce", run, "--to", tmp_path / "other", "--until", "prepare", "--json")
    assert outcome.code == 1
    finding = outcome.json["first"]
    assert (finding["stage"], finding["check"], finding["what"]) == ("prepare", "content", "data.sources[0].path")
    assert (finding["recorded"], finding["again"]) == (locked, file_sha256(run / data.name))
    assert not (tmp_path / "other").exists()
    checked = spec("lock", "--check", run)
    assert checked.code == 1
    assert locked in checked.out


def test_until_makes_and_compares_no_more_than_that(spec: Spec, kept: Path, first: Outcome, tmp_path: Path) -> None:
    """`--until prepare` neither captures nor trains."""
    outcome = spec("reproduce", kept, "--to", tmp_path / "to", "--until", "prepare", "--json")
    assert outcome.code == 0
    assert {finding["stage"] for finding in outcome.json["findings"]} == {"verifier", "prepare"}
    (again,) = (tmp_path / "to" / "runs").iterdir()
    assert not (again / "checkpoints").exists()
    assert not list((tmp_path / "to" / "cache" / "states").glob("[!.]*"))


def test_another_number_of_threads_can_matter_and_the_locks_is_used(spec: Spec, run: Path, to: Path) -> None:
    """The difference is reported, and the re-run uses the lock's number, so equal bits can still be promised."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert torch.get_num_threads() == before
    (difference,) = outcome.json["environment"]
    assert (difference["key"], difference["locked"], difference["here"]) == ("threads", before, before + 1)
    assert difference["matters"]
    assert outcome.json["tolerance"] is None
    assert outcome.code == 0


def test_the_lock_keeps_every_environment_that_worked_on_a_run(
    spec: Spec, run: Path, first: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage made in another environment is recorded, a call that does nothing is not; bits are no longer promised."""
    (bench,) = (run / "bench").iterdir()
    bench.unlink()
    with monkeypatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        for _ in range(2):
            assert spec("run", "smoke", "--runs", run.parent, "--quiet").code == 0
    assert spec("run", "smoke", "--runs", run.parent, "--quiet").code == 0
    lock = json.loads((run / "lock.json").read_text())
    assert lock["environment"]["variables"] == {}
    assert [other["variables"] for other in lock["resumed_in"]] == [{"NVIDIA_TF32_OVERRIDE": "0"}]
    printed = spec("reproduce", run, "--to", run.parent / "to", "--until", "prepare", "--json").json
    assert printed["tolerance"] == 0.01
    resumed = [(each["key"], each["matters"]) for each in printed["environment"]]
    assert resumed == [("resumed in: variables.NVIDIA_TF32_OVERRIDE", True)]


def test_bad_usage_is_one_error(spec: Spec, run: Path, tmp_path: Path) -> None:
    """A missing folder or stage, or a target that holds something else or the run itself, exits with 2."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no such run"),
        ((run, "--until", "later"), "available: verifier, prepare"),
        ((run, "--to", full), "holds no re-run"),
        ((run, "--to", run / "inside"), "must be kept apart"),
        ((run, "--to", run.parent), "must be kept apart"),
    ):
        outcome = spec("reproduce", *arguments)
        assert outcome.code == 2, arguments
        assert message in outcome.err
        assert "Traceback" not in outcome.err
    assert (full / "mine.txt").read_text() == "mine"
