"""A process that is killed at any moment, and the one that resumes after it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from training_toy import MUON, batches, build, exported_weights, make_job, run, weights

from speculators.events import StepEvent
from speculators.files import folders
from speculators.training.checkpoint import complete
from speculators.training.world import World

# Processes are real, and cheap: the server imports once, what torch's optimizers import late included, and forks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch._dynamo", "speculators.training.loop"])


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_written(folder: Path, name: str, real):
    """Wraps `real` so that it kills the process once `name` exists in `folder`."""

    def deadly(*arguments):
        if (folder / name).exists():
            die()
        return real(*arguments)

    return deadly


def child(folder: Path, where: str) -> None:
    """Trains the toy, which draws from torch, numpy and Python; dies at `where`, or writes weights and losses.

    The weights are those that training goes on with, and beside them their averages, which are exported.
    """
    torch.set_num_threads(1)
    deadly_step = {"before any checkpoint": 1, "between checkpoints": 3}.get(where, -1)
    if where == "while tensors are written":
        os.fsync = die_when_written(folder, "writing-00000004", os.fsync)
    elif where == "before the rename":
        Path.replace = die_when_written(folder, "writing-00000004/manifest.json", Path.replace)
    elif where == "while old ones are removed":
        folders.sync_folder = die_when_written(folder, "step-00000004", folders.sync_folder)
    model = build(host_random=True)
    pure = batches(World(), before=lambda step: step == deadly_step and die())
    events = list(run(model, make_job(folder, optimizer=MUON, keep_checkpoints=1, ema=0.4), batches=pure))
    losses = {event.step: event.loss for event in events if isinstance(event, StepEvent)}
    exported = {f"exported {name}": value for name, value in exported_weights(folder).items()}
    torch.save({"weights": weights(model) | exported, "losses": losses}, folder / "out.pt")


def spawn(folder: Path, where: str = "nowhere") -> int | None:
    folder.mkdir(exist_ok=True)
    process = SERVER.Process(target=child, args=(folder, where))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert spawn(folder) == 0
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize(
    ("where", "resumes_at"),
    [
        ("before any checkpoint", 1),
        ("between checkpoints", 3),
        ("while tensors are written", 3),
        ("before the rename", 3),
        ("while old ones are removed", 5),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, uninterrupted, where, resumes_at):
    """After kill -9 only whole checkpoints are left, and the next process ends with the same bits in every weight."""
    assert spawn(tmp_path, where) == -signal.SIGKILL
    left = complete(tmp_path)
    assert all(folders.verify(path)["state"]["step"] < resumes_at for path in left)
    assert spawn(tmp_path) == 0
    found = torch.load(tmp_path / "out.pt")
    assert found["losses"] == {step: loss for step, loss in uninterrupted["losses"].items() if step >= resumes_at}
    assert found["weights"].keys() == uninterrupted["weights"].keys()
    assert all(torch.equal(value, found["weights"][name]) for name, value in uninterrupted["weights"].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pt", "step-00000006"]
