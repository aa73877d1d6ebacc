"""Checkpoints on disk: which are kept, which is best, and what happens to damaged, foreign and unwritable ones."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint.filesystem as dcp_files
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training_toy import MUON, build, make_job, run, weights

from speculators.errors import ArtifactError
from speculators.events import SaveEvent, StepEvent, WarningEvent
from speculators.files.folders import read_manifest, seal
from speculators.training import snapshot
from speculators.training.checkpoint import best, complete, latest
from speculators.training.snapshot import load_weights


def names(folder):
    return [path.name for path in complete(folder)]


def test_the_latest_and_the_best_are_kept(tmp_path):
    """The latest two checkpoints and the one with the largest acceptance length are kept; among equals, the first."""
    taus = iter([1.1, 1.5, 1.3, 1.5, 1.2, 1.4])
    job = make_job(tmp_path, checkpoint_every=1, evaluate_every=1)
    events = list(run(build(), job, evaluate=lambda: (next(taus), {})))
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert best(tmp_path).name == "step-00000002"
    assert latest(tmp_path).name == "step-00000006"
    assert [event.step for event in events if isinstance(event, SaveEvent) and event.best] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == names(tmp_path)


def test_a_new_best_is_saved_even_when_no_checkpoint_is_due(tmp_path):
    """An evaluation that improves saves its weights, which can be loaded alone."""
    model, seen = build(), []

    def evaluate():
        seen.append(weights(model))
        return [1.2, 1.6, 1.4][len(seen) - 1], {"loss": 0.0}

    list(run(model, make_job(tmp_path, checkpoint_every=100, evaluate_every=2), evaluate=evaluate))
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    other = build(seed=0)
    load_weights(other, best(tmp_path))
    assert all(torch.equal(value, seen[1][name]) for name, value in weights(other).items())


def damage(path, how):
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "truncated":
        data.write_bytes(content[:-10])
    else:
        (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    """Training resumes from the previous checkpoint, names the damaged one, and ends with the same weights."""
    expected = build()
    list(run(expected, make_job(tmp_path / "whole")))
    for event in run(build(), make_job(tmp_path / "a")):
        if isinstance(event, SaveEvent) and event.step == 4:
            break
    damage(tmp_path / "a" / "step-00000004", how)
    model = build()
    warning, *events = run(model, make_job(tmp_path / "a"))
    assert isinstance(warning, WarningEvent)
    assert str(tmp_path / "a" / "step-00000004") in warning.message
    assert [event.step for event in events if isinstance(event, StepEvent)] == [3, 4, 5, 6]
    assert (tmp_path / "a" / "damaged-step-00000004").is_dir()
    assert all(torch.equal(weights(expected)[name], value) for name, value in weights(model).items())


def test_when_the_best_is_damaged_the_best_of_the_others_counts(tmp_path):
    """A damaged best checkpoint does not keep a lower, intact one from becoming the best."""
    taus = iter([1.9, 1.2, 1.3, 1.4, 1.5, 1.45])
    job = make_job(tmp_path, checkpoint_every=2, evaluate_every=1)
    for event in run(build(), job, evaluate=lambda: (next(taus), {})):
        if isinstance(event, SaveEvent) and event.step == 4:
            break
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]
    damage(tmp_path / "step-00000001", "truncated")
    list(run(build(), job, evaluate=lambda: (next(taus), {})))
    assert best(tmp_path).name == "step-00000005"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """A checkpoint with another fingerprint raises an error that names both; nothing is overwritten."""
    list(run(build(), make_job(tmp_path)))
    with pytest.raises(ArtifactError, match=r"belongs to another run.*ffffffff.*00000000"):
        list(run(build(), make_job(tmp_path, fingerprint="0" * 64)))
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


class FullDisk:
    """A file on a disk that accepts `room` more bytes and then is full."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("where", ["tensors", "index", "manifest"])
def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch, where):
    """Whichever file fills the disk, the error says so and names the checkpoint to resume from, which still works."""
    real_open = type(tmp_path).open
    fills = {"tensors": ".distcp", "index": ".metadata.tmp", "manifest": "manifest.json.tmp"}[where]

    def fill(path, *arguments, **named):
        stream = real_open(path, *arguments, **named)
        is_it = "writing-00000004" in str(path) and path.name.endswith(fills) and "r" not in str(arguments)
        return FullDisk(stream, 100) if is_it else stream

    monkeypatch.setattr(type(tmp_path), "open", fill)
    monkeypatch.setattr(FullDisk, "__enter__", lambda self: self, raising=False)
    monkeypatch.setattr(FullDisk, "__exit__", lambda self, *error: self.stream.close(), raising=False)
    model = build()
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        list(run(model, make_job(tmp_path)))
    assert "disk is full" in str(caught.value)
    assert str(tmp_path / "step-00000002") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    events = list(run(build(), make_job(tmp_path)))
    assert [event.step for event in events if isinstance(event, StepEvent)] == [3, 4, 5, 6]


def test_leftovers_of_killed_writers_are_removed_and_never_read(tmp_path):
    """Folders without a manifest, or still being written, do not count as checkpoints; the next save removes them."""
    (tmp_path / "writing-00000003").mkdir()
    (tmp_path / "step-00000099").mkdir()
    assert latest(tmp_path) is None
    list(run(build(), make_job(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_frozen_parameters_are_not_stored_but_buffers_are(tmp_path):
    """A checkpoint holds what training changes and the vocabulary maps, but not the verifier's embedding."""
    list(run(build(), make_job(tmp_path, optimizer=MUON)))
    index = dcp_files.FileSystemReader(latest(tmp_path)).read_metadata()
    stored = set(index.state_dict_metadata)
    assert "model.d2t" in stored
    assert "optimizer.fc.weight.momentum_buffer" in stored
    assert not [name for name in stored if "embed_tokens" in name or name.endswith(".scale")]


def test_the_manifest_says_what_the_checkpoint_is(tmp_path):
    """The manifest gives state, fingerprint and acceptance length without torch."""
    taus = itertools.count(1, 0.25)
    list(run(build(), make_job(tmp_path, evaluate_every=6), evaluate=lambda: (next(taus), {})))
    found = json.loads((latest(tmp_path) / "manifest.json").read_text())
    assert found["state"] == {"step": 6, "tokens": 6 * 48, "best_tau": 1.0, "best_step": 6}
    assert (found["tau"], found["fingerprint"], found["world_size"]) == (1.0, "f" * 64, 1)


class Program:
    """An object that unpickles by running a program."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("kind", ["a program", "bytes that torch unpickles"])
def test_a_checkpoint_with_a_program_in_it_is_refused(kind, tmp_path):
    """Although a forger can make the manifest right, neither resuming nor comparing runs the program."""
    list(run(build(), make_job(tmp_path / "run")))
    path, made = latest(tmp_path / "run"), tmp_path / "made"
    forged = snapshot.metadata_of(path)
    if kind == "a program":
        forged.planner_data = Program(made)
    else:
        forged.state_dict_metadata["model.fc.weight"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(forged))
    facts = {key: value for key, value in read_manifest(path).items() if key != "files"}
    (path / "manifest.json").unlink()
    seal(path, facts)
    class_name = "posix.mkdir" if kind == "a program" else r"metadata\.BytesStorageMetadata"
    words = rf"\.metadata: not a checkpoint of ours: it refers to \S*{class_name}, which"
    with pytest.raises(ArtifactError, match=words):
        list(run(build(), make_job(tmp_path / "run")))
    for read in (snapshot.names, lambda folder: snapshot.read_tensor(folder, "model.fc.weight")):
        with pytest.raises(ArtifactError, match=words):
            read(path)
    assert not made.exists()
