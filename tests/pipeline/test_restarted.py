"""torchrun restarts a launch that lost a process: it goes on by itself, and ends as if nothing had happened."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import WEIGHTS, Spec, events

PROGRAM = Path(__file__).with_name("restarted_launch.py")


def torchrun(home: Path, *, machines: int, marks: Path) -> Path:
    """Runs smoke in two processes, as torchrun's agents on so many machines would, and returns the run's folder.

    Args:
        marks: a folder where each process notes that it was killed; if it does not exist, none is killed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    spec = Spec(home)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}"]
    command += [f"--nproc_per_node={2 // machines}", "--max-restarts=2", "--rdzv_backend=c10d", "--rdzv_id=smoke"]
    command += [f"--rdzv_endpoint={endpoint}", str(PROGRAM), str(marks), "run", "smoke", "--runs", str(spec.runs)]
    # The last weights are exported, so that all updates count.
    command += ["--set", "schedule.evaluate_every=8"]
    environment = {**os.environ, "SPECULATORS_CACHE": str(spec.cache), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for _ in range(machines)
    ]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * machines, "\n".join(outputs)
    assert spec.half_written() == []
    (folder,) = spec.runs.iterdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    return torchrun(home, machines=1, marks=home / "nobody")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_launch_that_loses_its_processes_ends_with_the_same_bits(
    machines: int, undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 takes the second process, and after the restart the first, which writes the run's files and holds its
    lock. Nobody intervenes; losses, weights and acceptance are those of an undisturbed run, bit for bit."""
    marks = tmp_path / "marks"
    marks.mkdir()
    folder = torchrun(tmp_path, machines=machines, marks=marks)
    assert sorted(path.name for path in marks.iterdir()) == ["killed-0", "killed-1"]
    assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    found, expected = (
        [(each["step"], each["loss"]) for each in events(run, "StepEvent")] for run in (folder, undisturbed)
    )
    # Each launch resumed from the checkpoint of update 4.
    assert [step for step, _ in found] == [*range(1, 7), 5, 6, *range(5, 9)]
    assert set(found) == set(expected)
    taus = [[each["tau"] for each in events(run, "EvalEvent")] for run in (folder, undisturbed)]
    assert taus[0] == taus[1]
