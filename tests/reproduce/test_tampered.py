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
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert outcome.code == 1
    assert differing(outcome) == [("train", "updates")]
    finding = outcome.json["first"]
    assert (finding["stage"], finding["step"], finding["what"]) == ("train", 5, "loss")
    assert 0 < finding["by"] < 1e-14
    text = spec("reproduce", run, "--to", to).out.splitlines()[-1]
    assert text.startswith("not reproduced: the first difference is in stage train, update 5, loss, by ")


def test_the_earliest_update_is_the_first_difference(spec: Spec, run: Path, to: Path) -> None:
    """An evaluation after update 4 comes before a gradient norm of update 6, and a missing update is named."""
    edited_event(run, "StepEvent", 6, lambda event: event.update(grad_norm=1.0))
    edited_event(run, "EvalEvent", 4, lambda event: event.update(tau=event["tau"] + 0.25))
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert differing(outcome) == [("train", "updates"), ("train", "evaluations")]
    finding = outcome.json["first"]
    assert (finding["check"], finding["step"], finding["what"], finding["by"]) == ("evaluations", 4, "tau", 0.25)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if '"step": 3,' not in line))
    finding = spec("reproduce", run, "--to", to, "--json").json["first"]
    assert (finding["step"], finding["evidence"]) == (3, "update 3 is not in the log of the run")


def test_a_changed_byte_of_the_weights_is_named_by_tensor(spec: Spec, run: Path, to: Path) -> None:
    """The finding names tensor, element, count and difference, and that the file was altered."""
    content = bytearray((run / WEIGHTS).read_bytes())
    content[-2] ^= 1
    (run / WEIGHTS).write_bytes(content)
    with safe_open(run / WEIGHTS, "pt") as file:
        names = file.keys()
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert outcome.code == 1
    assert differing(outcome) == [("train", "weights")]
    finding = outcome.json["first"]
    assert any(finding["what"].startswith(f"{name}[") for name in names)
    assert "(1 of " in finding["what"]
    assert finding["by"] == abs(finding["recorded"] - finding["again"]) > 0
    assert "model.safetensors in the run was altered after the run wrote it" in finding["evidence"]


def test_other_weights_are_named_even_where_the_run_vouches_for_them(spec: Spec, run: Path, to: Path) -> None:
    """A tensor with another value is reported, even if its recorded hash was updated."""
    tensors = load_file(run / WEIGHTS)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.float32)
    tensors[name].view(-1)[3] += 1.0
    save_file(tensors, run / WEIGHTS)
    edited(run / "train.json", lambda table: table["files"].update({WEIGHTS.name: file_sha256(run / WEIGHTS)}))
    finding = spec("reproduce", run, "--to", to, "--json").json["first"]
    assert finding["what"].startswith(f"{name}[")
    assert finding["by"] == pytest.approx(1.0, rel=1e-5)
    assert "altered" not in finding["evidence"]


def test_an_altered_checkpoint_is_named_by_its_update(spec: Spec, run: Path, to: Path) -> None:
    """An altered checkpoint is reported before the weights that were exported from it."""
    (file,) = (run / "checkpoints" / "step-00000008").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert differing(outcome) == [("train", "checkpoints")]
    assert outcome.json["first"]["step"] == 8
    assert "altered" in outcome.json["first"]["evidence"]


def test_another_benchmark_is_named_by_its_setting(spec: Spec, run: Path, to: Path) -> None:
    """The finding names suite, K, T and value; speeds are never compared."""
    (file,) = (run / "bench").iterdir()

    def edit(table: dict) -> None:
        table["settings"][1]["exact"]["tau"] += 0.125
        table["settings"][1]["live"]["speed"]["plain"] = 1.0

    edited(file, edit)
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert differing(outcome) == [("bench", "results")]
    finding = outcome.json["first"]
    assert (finding["what"], finding["by"]) == ("quickstart/K=3/T=0.exact.tau", 0.125)


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
    edited(store / "manifest.json", lambda table: table["shards"][0].update(sha256=file_sha256(shard)))
    edited(shard.with_suffix(".json"), lambda table: table.pop("conversations"))
    edited(run / "made.json", lambda table: table["capture"]["files"].update({shard.name: file_sha256(shard)}))
    outcome = other("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert differing(outcome) == [("capture", "files")]
    finding = outcome.json["first"]
    assert re.match(r"conversation \d+, last\[\d+, 31\] \(1 of ", finding["what"])
    assert finding["by"] > 0
    shutil.rmtree(store)
    finding = other("reproduce", run, "--to", to, "--until", "capture", "--json").json["first"]
    assert finding["what"] == shard.name
    assert "the sha256 differs" in finding["evidence"]


def test_another_seed_is_named_as_input_and_by_what_it_does(spec: Spec, run: Path, tmp_path: Path) -> None:
    """An edited lock is run as it stands: the findings name the seed, and the first loss that differs."""
    edited(run / "lock.json", lambda table: table["recipe"].update(seed=1))
    outcome = spec("reproduce", run, "--to", tmp_path / "to", "--until", "train", "--json")
    assert outcome.code == 1
    assert outcome.json["first"]["evidence"] == "seed is 0 in the lock, and 1 by its recipe"
    updates = next(finding for finding in outcome.json["findings"] if finding["check"] == "updates")
    assert (updates["result"], updates["step"], updates["what"]) == ("differs", 1, "loss")
    assert updates["by"] > 0.001
    assert "8 of 8 updates differ" in updates["evidence"]


def test_another_verifier_ends_it_before_anything_runs(spec: Spec, run: Path, tmp_path: Path) -> None:
    """The verifier's files are hashed before they are used, including a converted one from the cache."""
    edited(run / "lock.json", lambda table: table["verifier"]["files"].update({"model.safetensors": "0" * 64}))
    outcome = spec("reproduce", run, "--to", tmp_path / "to", "--json")
    assert outcome.code == 1
    assert (outcome.json["first"]["stage"], outcome.json["first"]["what"]) == ("verifier", "model.safetensors")
    assert not (tmp_path / "to").exists()


def test_another_package_version_can_matter_and_is_held_to_the_tolerance(spec: Spec, run: Path, to: Path) -> None:
    """The recipe's tolerance then decides: a loss that is a little off is within it, one far off is not."""
    edited(run / "lock.json", lambda table: table["environment"]["packages"].update(torch="0.0.0"))
    edited_event(run, "StepEvent", 5, lambda event: event.update(loss=event["loss"] * 1.001))
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert outcome.code == 0, outcome.out
    (difference,) = outcome.json["environment"]
    assert (difference["key"], difference["locked"], difference["matters"]) == ("packages.torch", "0.0.0", True)
    assert outcome.json["tolerance"] == 0.01
    updates = next(finding for finding in outcome.json["findings"] if finding["check"] == "updates")
    assert (updates["result"], updates["step"]) == ("within tolerance", 5)
    text = spec("reproduce", run, "--to", to).out
    assert "can matter" in text
    assert text.splitlines()[-1].startswith("reproduced within the tolerance")
    edited_event(run, "StepEvent", 5, lambda event: event.update(loss=event["loss"] * 1.1))
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert (outcome.code, outcome.json["first"]["step"]) == (1, 5)


def test_what_was_lost_is_not_called_reproduced(spec: Spec, run: Path, to: Path) -> None:
    """Without log, training result and benchmark, the run is not fully verified: each is named, with exit code 1."""
    (run / "events.jsonl").unlink()
    (run / "train.json").unlink()
    shutil.rmtree(run / "bench")
    outcome = spec("reproduce", run, "--to", to, "--json")
    assert (outcome.code, outcome.json["first"]) == (1, None)
    assert (outcome.json["verdict"], outcome.json["reproduced"]) == ("not fully verified", False)
    assert outcome.json["unverified"] == ["train updates", "train evaluations", "train weights", "bench results"]
    text = spec("reproduce", run, "--to", to).out.splitlines()
    assert "not fully verified: train updates, train evaluations, train weights, bench results" in " ".join(text[-2:])


def test_what_was_lost_after_the_last_stage_asked_for_does_not_matter(spec: Spec, run: Path, to: Path) -> None:
    """`--until capture` verifies the data and the states of a run that lost its training."""
    (run / "train.json").unlink()
    outcome = spec("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert (outcome.code, outcome.json["verdict"], outcome.json["unverified"]) == (0, "reproduced", [])
    (run / "made.json").unlink()
    outcome = spec("reproduce", run, "--to", to, "--until", "capture", "--json")
    assert (outcome.code, outcome.json["unverified"]) == (1, ["prepare files", "capture files"])


def cut(run: Path) -> None:
    (run / "lock.json").write_text((run / "lock.json").read_text()[:300])


def without_fingerprints(run: Path) -> None:
    edited(run / "lock.json", lambda table: table.pop("fingerprints"))


def other_inputs(run: Path) -> None:
    edited(run / "lock.json", lambda table: table["inputs"]["prepare"].pop("sources"))


def newer(run: Path) -> None:
    edited(run / "lock.json", lambda table: table.update(format=99))


def older(run: Path) -> None:
    edited(run / "lock.json", lambda table: table.update(format=1))


def another_algorithm(run: Path) -> None:
    edited(run / "lock.json", lambda table: table["recipe"]["algorithm"].update(name="nope"))


@pytest.mark.parametrize(
    ("damage", "message"),
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
    spec: Spec, run: Path, to: Path, damage: Callable[[Path], None], message: str
) -> None:
    """A missing, damaged, newer or older lock, or one of an unknown algorithm, exits with 2, without traceback."""
    damage(run)
    outcome = spec("reproduce", run, "--to", to)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
