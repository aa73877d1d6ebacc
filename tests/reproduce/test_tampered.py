"""`spec reproduce` names stage, update, tensor and difference in a run that was tampered with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import WEIGHTS, Spec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tampering import differing, edited, edited_event

from speculators.files.disk import file_sha256


def test_a_changed_loss_is_named_at_its_update(spec: Spec, run: Path, to: Path) -> None:
    """The least bit of one loss is reported with stage, update, value and difference; nothing else is."""
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
    """An evaluation after update 4 comes before a gradient norm of update 6, and a missing update is named."""
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
    """The finding names tensor, element, count and difference, and that the file was altered."""
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
    """A tensor with another value is reported, even if its recorded hash was updated."""
    tensors = load_file(run / WEIGHTS)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.float32)
    tensors[name].view(-1)[3] += 1.0
    save_file(tensors, run / WEIGHTS)
    edited(run / "train.json", lambda held: held["files"].update({WEIGHTS.name: file_sha256(run / WEIGHTS)}))
    found = spec("reproduce", run, "--to", to, "--json").json["first"]
    assert found["what"].startswith(f"{name}[")
    assert found["by"] == pytest.approx(1.0, rel=1e-5)
    assert "altered" not in found["evidence"]


def test_an_altered_checkpoint_is_named_by_its_update(spec: Spec, run: Path, to: Path) -> None:
    """An altered checkpoint is reported before the weights that were exported from it."""
    (file,) = (run / "checkpoints" / "step-00000008").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = spec("reproduce", run, "--to", to, "--json")
    assert differing(told) == [("train", "checkpoints")]
    assert told.json["first"]["step"] == 8
    assert "altered" in told.json["first"]["evidence"]


def test_another_benchmark_is_named_by_its_setting(spec: Spec, run: Path, to: Path) -> None:
    """The finding names suite, K, T and value; speeds are never compared."""
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
    """If the run's own states are still cached, conversation and tensor are named; otherwise the file is."""
    other = Spec(tmp_path / "home")
    shutil.copytree(spec.cache, other.cache)
    key = json.loads((run / "lock.json").read_text())["fingerprints"]["capture"][:16]
    store = other.cache / "states" / key
    (shard,) = store.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1  # of the last token of the longest conversation
    shard.write_bytes(content)
    edited(store / "manifest.json", lambda held: held["shards"][0].update(sha256=file_sha256(shard)))
    edited(run / "made.json", lambda held: held["capture"]["files"].update({shard.name: file_sha256(shard)}))
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
    """An edited lock is run as it stands: the findings name the seed, and the first loss that differs."""
    edited(run / "lock.json", lambda held: held["recipe"].update(seed=1))
    told = spec("reproduce", run, "--to", tmp_path / "to", "--until", "train", "--json")
    assert told.code == 1
    assert told.json["first"]["evidence"] == "seed is 0 in the lock, and 1 by its recipe"
    updates = next(found for found in told.json["findings"] if found["check"] == "updates")
    assert (updates["result"], updates["step"], updates["what"]) == ("differs", 1, "loss")
    assert updates["by"] > 0.001
    assert "8 of 8 updates differ" in updates["evidence"]


def test_another_verifier_ends_it_before_anything_runs(spec: Spec, run: Path, tmp_path: Path) -> None:
    """The verifier's files are hashed before they are used, including a converted one from the cache."""
    edited(run / "lock.json", lambda held: held["verifier"]["files"].update({"model.safetensors": "0" * 64}))
    told = spec("reproduce", run, "--to", tmp_path / "to", "--json")
    assert told.code == 1
    assert (told.json["first"]["stage"], told.json["first"]["what"]) == ("verifier", "model.safetensors")
    assert not (tmp_path / "to").exists()


def test_another_package_version_can_matter_and_is_held_to_the_tolerance(spec: Spec, run: Path, to: Path) -> None:
    """The recipe's tolerance then decides: a loss that is a little off is within it, one far off is not."""
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


def test_what_was_lost_is_not_called_reproduced(spec: Spec, run: Path, to: Path) -> None:
    """Without log, training result and benchmark, the run is not fully verified: each is named, with exit code 1."""
    (run / "events.jsonl").unlink()
    (run / "train.json").unlink()
    shutil.rmtree(run / "bench")
    told = spec("reproduce", run, "--to", to, "--json")
    assert (told.code, told.json["first"]) == (1, None)
    assert (told.json["verdict"], told.json["reproduced"]) == ("not fully verified", False)
    assert told.json["unverified"] == ["train updates", "train evaluations", "train weights", "bench results"]
    text = spec("reproduce", run, "--to", to).out.splitlines()
    assert "not fully verified: train updates, train evaluations, train weights, bench results" in " ".join(text[-2:])


def test_what_was_lost_after_the_last_stage_asked_for_does_not_matter(spec: Spec, run: Path, to: Path) -> None:
    """`--until capture` verifies the data and the states of a run that lost its training."""
    (run / "train.json").unlink()
    told = spec("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert (told.code, told.json["verdict"], told.json["unverified"]) == (0, "reproduced", [])
    (run / "made.json").unlink()
    told = spec("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert (told.code, told.json["unverified"]) == (1, ["prepare files", "capture files"])


def cut(run: Path) -> None:
    (run / "lock.json").write_text((run / "lock.json").read_text()[:300])


def without_fingerprints(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.pop("fingerprints"))


def other_inputs(run: Path) -> None:
    edited(run / "lock.json", lambda held: held["inputs"]["prepare"].pop("sources"))


def newer(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.update(format=99))


def older(run: Path) -> None:
    edited(run / "lock.json", lambda held: held.update(format=1))


def another_algorithm(run: Path) -> None:
    edited(run / "lock.json", lambda held: held["recipe"]["algorithm"].update(name="nope"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "lock.json").unlink(), "it has no lock.json"),
        (cut, "damaged"),
        (lambda run: (run / "lock.json").write_text("[]"), "damaged"),
        (without_fingerprints, "fingerprints: is missing"),
        (other_inputs, "prepare: the fingerprint does not match the inputs"),
        (newer, "format 99 is newer"),
        (older, "lacks the recipe"),
        (another_algorithm, "no algorithm 'nope'"),
    ],
)
def test_a_lock_that_cannot_be_used_is_one_error(
    spec: Spec, run: Path, to: Path, damage: Callable[[Path], None], words: str
) -> None:
    """A missing, damaged, newer or older lock, or one of an unknown algorithm, exits with 2, without traceback."""
    damage(run)
    told = spec("reproduce", run, "--to", to)
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err
