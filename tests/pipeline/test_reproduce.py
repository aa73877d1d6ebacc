"""`spec reproduce`: a run made again from its lock, and what was tampered with named at its stage, update and tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import WEIGHTS, Spec, Told, events
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_interrupted import spawn

from speculators.data.files import sha256_of
from speculators.events import Event, StepEvent
from speculators.report.progress import RunView

STAGES = ["verifier", "prepare", "capture", "train", "bench"]


@pytest.fixture(autouse=True)
def _threads():
    """A re-run takes over the lock's number of threads: the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kept(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of smoke that all tests here share, read only."""
    return Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("kept") / run_folder.name))


@pytest.fixture(scope="module")
def to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its re-run, which is made once: a second call goes on from what is there, which is all."""
    return tmp_path_factory.mktemp("again") / "to"


@pytest.fixture(scope="module")
def first(spec: Spec, kept: Path, to: Path) -> Told:
    """What the first `spec reproduce` said."""
    return spec("reproduce", kept, "--to", to, "--json")


@pytest.fixture
def run(kept: Path, tmp_path: Path, first: Told) -> Path:
    """A copy of the run to tamper with."""
    return Path(shutil.copytree(kept, tmp_path / kept.name))


def edited(file: Path, edit: Callable[[Any], None]) -> None:
    """Rewrites a JSON file."""
    held = json.loads(file.read_text())
    edit(held)
    file.write_text(json.dumps(held))


def edited_event(run: Path, kind: str, step: int, edit: Callable[[dict], None]) -> None:
    """Rewrites the last record of one update or evaluation in a log."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    edit([line for line in lines if line["event"] == kind and line["step"] == step][-1])
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def differing(told: Told) -> list[tuple[str, str]]:
    return [(found["stage"], found["check"]) for found in told.json["findings"] if found["result"] == "differs"]


def test_a_run_is_reproduced_bit_for_bit(kept: Path, first: Told) -> None:
    """Data, states, every loss, checkpoints, weights and benchmark: exit 0, held to the bits, each check the same."""
    assert first.code == 0, first.out + first.err
    assert first.json["reproduced"]
    assert first.json["tolerance"] is None
    assert first.json["environment"] == []
    checks = [(found["stage"], found["check"]) for found in first.json["findings"]]
    assert [stage for stage in STAGES if stage in dict(checks)] == STAGES
    assert {check for stage, check in checks if stage == "train"} == {
        *("inputs", "updates", "evaluations", "checkpoints", "chosen", "weights", "config.json")
    }
    assert {found["result"] for found in first.json["findings"]} == {"same"}


def test_nothing_of_the_run_is_taken_over(kept: Path, to: Path, first: Told) -> None:
    """Conversations, states and weights are made in the re-run's own folders; the run is left as it was."""
    (again,) = (to / "runs").iterdir()
    done = [event["stage"] for event in events(again, "StageEvent") if event["status"] == "done"]
    assert [stage for stage in STAGES if stage in done] == STAGES[1:]
    assert {folder.name for folder in (to / "cache").iterdir()} == {"conversations", "states"}
    assert (again / WEIGHTS).stat().st_ino != (kept / WEIGHTS).stat().st_ino
    assert json.loads((to / "reproduction.json").read_text()) == first.json


def test_the_log_keeps_every_bit_of_a_loss(run_folder: Path) -> None:
    """What JSON holds is read back to the same number: the text is the shortest that does so."""
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    losses = [re.search(r'"loss": ([^,]+),', line).group(1) for line in lines if '"StepEvent"' in line]
    assert len(losses) >= 8
    assert all(repr(float(text)) == text and len(text) > 12 for text in losses)


def test_the_recipe_of_the_lock_is_run_and_not_the_file(spec: Spec, run: Path, to: Path) -> None:
    """Whatever became of the file since."""
    (run / "recipe.toml").write_text("format = 99\n")
    assert spec("reproduce", run, "--to", to, "--quiet").code == 0


def test_a_table_by_stage_ends_in_the_verdict(spec: Spec, run: Path, to: Path) -> None:
    """Stage, check, result, evidence; a finished re-run is only compared, and says that it is there."""
    told = spec("reproduce", run, "--to", to)
    assert told.code == 0
    assert "train already done" in told.err
    assert re.search(r"train +updates +same +8 updates", told.out)
    assert told.out.splitlines()[-1].startswith("reproduced to the same bits")


def test_a_killed_and_resumed_run_is_reproduced(spec: Spec, fresh: Spec, first: Told) -> None:
    """kill -9 between updates: the last record of an update counts, and the one before it is the same."""
    assert spawn(fresh.home, "between updates") == -signal.SIGKILL
    resumed = fresh.run()
    assert resumed.code == 0, resumed.err
    (run,) = fresh.runs.iterdir()
    assert [event["step"] for event in events(run, "StepEvent")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    told = fresh("reproduce", run, "--json")
    assert told.code == 0, told.out
    assert told.json["tolerance"] is None
    repeated = [found for found in told.json["findings"] if found["check"] == "repeated updates"]
    assert [(found["result"], found["evidence"][:1]) for found in repeated] == [("same", "1")]
    lines = (run / "events.jsonl").read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if '"step": 5' in line)
    other = json.loads(lines[place])
    lines[place] = json.dumps({**other, "loss": other["loss"] + 0.5})
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    told = fresh("reproduce", run, "--json")
    assert differing(told) == [("train", "repeated updates")]
    assert told.json["first"]["step"] == 5
    assert told.json["first"]["by"] == pytest.approx(0.5)


def test_ctrl_c_leaves_a_folder_that_a_second_call_goes_on_from(
    spec: Spec, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 130, one word; the second call makes the rest, and the whole is the same bits."""
    render, pressed = RunView.__call__, []

    def press(self: RunView, event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 2 and not pressed:
            pressed.append(event)
            os.kill(os.getpid(), signal.SIGINT)
        render(self, event)

    monkeypatch.setattr(RunView, "__call__", press)
    told = spec("reproduce", kept, "--to", tmp_path / "to")
    assert told.code == 130, told.err
    assert told.err.splitlines()[-1] == "interrupted"
    told = spec("reproduce", kept, "--to", tmp_path / "to", "--json")
    assert told.code == 0, told.out
    assert "capture already done" in told.err
    (again,) = (tmp_path / "to" / "runs").iterdir()
    assert [event["step"] for event in events(again, "StepEvent")] == list(range(1, 9))


# Tampering: what is edited, and the stage, check, update, words of the value, and amount that must be named.


def test_a_changed_loss_is_named_at_its_update(spec: Spec, run: Path, to: Path) -> None:
    """The least bit of one loss: stage, update, value, and by how much; nothing else is blamed."""
    edited_event(run, "StepEvent", 5, lambda event: event.update(loss=event["loss"] * (1 + 2**-52)))
    told = spec("reproduce", run, "--to", to, "--json")
    assert told.code == 1
    assert differing(told) == [("train", "updates")]
    found = told.json["first"]
    assert (found["stage"], found["step"], found["what"]) == ("train", 5, "loss")
    assert 0 < found["by"] < 1e-14
    text = spec("reproduce", run, "--to", to).out.splitlines()[-1]
    assert text.startswith("not reproduced: the first difference is in stage train, update 5, loss, by ")


def test_the_earliest_update_is_the_first_difference(spec: Spec, run: Path, to: Path) -> None:
    """An evaluation after update 4 comes before a gradient norm of update 6, and a missing update is told as such."""
    edited_event(run, "StepEvent", 6, lambda event: event.update(grad_norm=1.0))
    edited_event(run, "EvalEvent", 4, lambda event: event.update(tau=event["tau"] + 0.25))
    told = spec("reproduce", run, "--to", to, "--json")
    assert differing(told) == [("train", "updates"), ("train", "evaluations")]
    found = told.json["first"]
    assert (found["check"], found["step"], found["what"], found["by"]) == ("evaluations", 4, "tau", 0.25)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if '"step": 3,' not in line))
    found = spec("reproduce", run, "--to", to, "--json").json["first"]
    assert (found["step"], found["evidence"]) == (3, "update 3 is not in the log of the run")


def test_a_changed_byte_of_the_weights_is_named_by_tensor(spec: Spec, run: Path, to: Path) -> None:
    """Tensor, element, how many, by how much; and that the file is not what the run wrote."""
    content = bytearray((run / WEIGHTS).read_bytes())
    content[-2] ^= 1
    (run / WEIGHTS).write_bytes(content)
    with safe_open(run / WEIGHTS, "pt") as file:
        names = file.keys()
    told = spec("reproduce", run, "--to", to, "--json")
    assert told.code == 1
    assert differing(told) == [("train", "weights")]
    found = told.json["first"]
    assert any(found["what"].startswith(f"{name}[") for name in names)
    assert "(1 of " in found["what"]
    assert found["by"] == abs(found["recorded"] - found["again"]) > 0
    assert "model.safetensors in the run was altered after the run wrote it" in found["evidence"]


def test_other_weights_are_named_even_where_the_run_vouches_for_them(spec: Spec, run: Path, to: Path) -> None:
    """A tensor with another value, its hash brought up to date: the re-run still says no."""
    tensors = load_file(run / WEIGHTS)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.float32)
    tensors[name].view(-1)[3] += 1.0
    save_file(tensors, run / WEIGHTS)
    edited(run / "train.json", lambda held: held["files"].update({WEIGHTS.name: sha256_of(run / WEIGHTS)}))
    found = spec("reproduce", run, "--to", to, "--json").json["first"]
    assert found["what"].startswith(f"{name}[")
    assert found["by"] == pytest.approx(1.0, rel=1e-5)
    assert "altered" not in found["evidence"]


def test_an_altered_checkpoint_is_named_by_its_update(spec: Spec, run: Path, to: Path) -> None:
    """Before the weights that were exported from it."""
    (file,) = (run / "checkpoints" / "step-00000008").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = spec("reproduce", run, "--to", to, "--json")
    assert differing(told) == [("train", "checkpoints")]
    assert told.json["first"]["step"] == 8
    assert "altered" in told.json["first"]["evidence"]


def test_another_benchmark_is_named_by_its_setting(spec: Spec, run: Path, to: Path) -> None:
    """Suite, K, T and value; speeds are never compared."""
    (file,) = (run / "bench").iterdir()

    def edit(held: dict) -> None:
        held["settings"][1]["exact"]["tau"] += 0.125
        held["settings"][1]["live"]["speed"]["plain"] = 1.0

    edited(file, edit)
    told = spec("reproduce", run, "--to", to, "--json")
    assert differing(told) == [("bench", "results")]
    found = told.json["first"]
    assert (found["what"], found["by"]) == ("quickstart/K=3/T=0.exact.tau", 0.125)


def test_other_states_are_named_by_conversation_and_tensor(spec: Spec, run: Path, to: Path, tmp_path: Path) -> None:
    """Where the run's own states are still in the cache; else the file is, by its hash."""
    other = Spec(tmp_path / "home")
    shutil.copytree(spec.cache, other.cache)
    key = json.loads((run / "lock.json").read_text())["fingerprints"]["capture"][:16]
    store = other.cache / "states" / key
    (shard,) = store.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1  # of the last token of the longest conversation
    shard.write_bytes(content)
    edited(store / "manifest.json", lambda held: held["shards"][0].update(sha256=sha256_of(shard)))
    edited(run / "made.json", lambda held: held["capture"]["files"].update({shard.name: sha256_of(shard)}))
    told = other("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert differing(told) == [("capture", "files")]
    found = told.json["first"]
    assert re.match(r"conversation \d+, last\[\d+, 31\] \(1 of ", found["what"])
    assert found["by"] > 0
    shutil.rmtree(store)
    found = other("reproduce", run, "--to", to, "--until", "capture", "--json").json["first"]
    assert found["what"] == shard.name
    assert "the sha256 differs" in found["evidence"]


def test_another_seed_is_named_as_input_and_by_what_it_does(spec: Spec, run: Path, tmp_path: Path) -> None:
    """An edited lock is run as it stands: the seed that the fingerprint was made of, and the first loss that follows."""
    edited(run / "lock.json", lambda held: held["recipe"].update(seed=1))
    told = spec("reproduce", run, "--to", tmp_path / "to", "--until", "train", "--json")
    assert told.code == 1
    assert told.json["first"]["evidence"] == "seed is 0 in the lock, and 1 by its recipe"
    updates = next(found for found in told.json["findings"] if found["check"] == "updates")
    assert (updates["result"], updates["step"], updates["what"]) == ("differs", 1, "loss")
    assert updates["by"] > 0.001
    assert "8 of 8 updates differ" in updates["evidence"]


def test_an_input_is_obtained_by_its_hash(spec: Spec, first: Told, tmp_path: Path) -> None:
    """A file of one's own: found beside the run when it moved, refused with both hashes when its content changed."""
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
    locked = sha256_of(data)
    data.rename(run / data.name)
    again = spec("reproduce", run, "--to", tmp_path / "to", "--until", "prepare", "--json")
    assert again.code == 0, again.out + again.err
    assert spec("lock", "--check", run).code == 0
    (run / data.name).write_text("".join(lines[1:9]))
    told = spec("reproduce", run, "--to", tmp_path / "other", "--until", "prepare", "--json")
    assert told.code == 1
    found = told.json["first"]
    assert (found["stage"], found["check"], found["what"]) == ("prepare", "content", "data.sources[0].path")
    assert (found["recorded"], found["again"]) == (locked, sha256_of(run / data.name))
    assert not (tmp_path / "other").exists()
    checked = spec("lock", "--check", run)
    assert checked.code == 1
    assert locked in checked.out


def test_until_makes_and_compares_no_more_than_that(spec: Spec, kept: Path, first: Told, tmp_path: Path) -> None:
    """For a cheap check: `--until prepare` neither captures nor trains."""
    told = spec("reproduce", kept, "--to", tmp_path / "to", "--until", "prepare", "--json")
    assert told.code == 0
    assert {found["stage"] for found in told.json["findings"]} == {"verifier", "prepare"}
    (again,) = (tmp_path / "to" / "runs").iterdir()
    assert not (again / "checkpoints").exists()
    assert not (tmp_path / "to" / "cache" / "states").exists()


def test_another_verifier_ends_it_before_anything_runs(spec: Spec, run: Path, tmp_path: Path) -> None:
    """Its files are hashed before they are used; a converted one from the cache, too."""
    edited(run / "lock.json", lambda held: held["verifier"]["files"].update({"model.safetensors": "0" * 64}))
    told = spec("reproduce", run, "--to", tmp_path / "to", "--json")
    assert told.code == 1
    assert (told.json["first"]["stage"], told.json["first"]["what"]) == ("verifier", "model.safetensors")
    assert not (tmp_path / "to").exists()


def test_another_package_version_can_matter_and_is_held_to_the_tolerance(spec: Spec, run: Path, to: Path) -> None:
    """The recipe's tolerance then decides: a loss a little off is within it, one far off is not."""
    edited(run / "lock.json", lambda held: held["environment"]["packages"].update(torch="0.0.0"))
    edited_event(run, "StepEvent", 5, lambda event: event.update(loss=event["loss"] * 1.001))
    told = spec("reproduce", run, "--to", to, "--json")
    assert told.code == 0, told.out
    (difference,) = told.json["environment"]
    assert (difference["key"], difference["locked"], difference["matters"]) == ("packages.torch", "0.0.0", True)
    assert told.json["tolerance"] == 0.01
    updates = next(found for found in told.json["findings"] if found["check"] == "updates")
    assert (updates["result"], updates["step"]) == ("within tolerance", 5)
    text = spec("reproduce", run, "--to", to).out
    assert "can matter" in text
    assert text.splitlines()[-1].startswith("reproduced within the tolerance")
    edited_event(run, "StepEvent", 5, lambda event: event.update(loss=event["loss"] * 1.1))
    told = spec("reproduce", run, "--to", to, "--json")
    assert (told.code, told.json["first"]["step"]) == (1, 5)


def test_another_number_of_threads_can_matter_and_the_locks_is_used(spec: Spec, run: Path, to: Path) -> None:
    """It is reported; the re-run is given the lock's own, so that the bits can still be promised."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    told = spec("reproduce", run, "--to", to, "--json")
    assert torch.get_num_threads() == before
    (difference,) = told.json["environment"]
    assert (difference["key"], difference["locked"], difference["here"]) == ("threads", before, before + 1)
    assert difference["matters"]
    assert told.json["tolerance"] is None
    assert told.code == 0


def test_the_lock_keeps_every_environment_that_worked_on_a_run(spec: Spec, run: Path, first: Told) -> None:
    """A stage made by another number of threads is noted, a call that finds all done is not; bits are not promised."""
    (bench,) = (run / "bench").iterdir()
    bench.unlink()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    for _ in range(2):
        assert spec("run", "smoke", "--runs", run.parent, "--quiet").code == 0
    torch.set_num_threads(before)
    assert spec("run", "smoke", "--runs", run.parent, "--quiet").code == 0
    lock = json.loads((run / "lock.json").read_text())
    assert lock["environment"]["threads"] == before
    assert [other["threads"] for other in lock["resumed_in"]] == [before + 1]
    told = spec("reproduce", run, "--to", run.parent / "to", "--until", "prepare", "--json").json
    assert told["tolerance"] == 0.01
    assert [(each["key"], each["matters"]) for each in told["environment"]] == [("resumed in: threads", True)]


def cut(run: Path) -> None:
    (run / "lock.json").write_text((run / "lock.json").read_text()[:300])


def without_fingerprints(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.pop("fingerprints"))


def newer(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.update(format=99))


def older(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.update(format=1))


def another_algorithm(run: Path) -> None:
    edited(run / "lock.json", lambda held: held["recipe"]["algorithm"].update(name="nope"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "lock.json").unlink(), "there is no lock.json"),
        (cut, "damaged"),
        (lambda run: (run / "lock.json").write_text("[]"), "damaged"),
        (without_fingerprints, "fingerprints: is missing"),
        (newer, "format 99 is newer"),
        (older, "says too little"),
        (another_algorithm, "no algorithm 'nope'"),
    ],
)
def test_a_lock_that_cannot_be_used_is_one_error(
    spec: Spec, run: Path, to: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Missing, damaged, newer, older, of an unknown algorithm: exit 2, what and what to do, no traceback."""
    damage(run)
    told = spec("reproduce", run, "--to", to)
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err


def test_bad_usage_is_one_error(spec: Spec, run: Path, tmp_path: Path) -> None:
    """No such folder or stage, a folder that holds something else or the run itself: exit 2."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for arguments, words in (
        ((tmp_path / "nowhere",), "no such run folder"),
        ((run, "--until", "later"), "there are: verifier, prepare"),
        ((run, "--to", full), "holds no re-run"),
        ((run, "--to", run / "inside"), "must be kept apart"),
        ((run, "--to", run.parent), "must be kept apart"),
    ):
        told = spec("reproduce", *arguments)
        assert told.code == 2, arguments
        assert words in told.err
        assert "Traceback" not in told.err
    assert (full / "mine.txt").read_text() == "mine"
