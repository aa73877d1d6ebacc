"""A launch of several processes needs one cache and one runs folder, as on several nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def launch(caches: list[Path], runs: list[Path]) -> list[tuple[int, str]]:
    """Runs smoke's first stage in two processes that form one world; returns each exit code and output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank, (cache, folder) in enumerate(zip(caches, runs, strict=True)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SPECULATORS_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "speculators.cli", "run", "smoke", "--runs", str(folder), "--quiet"]
        sets = ["schedule.max_steps=1", "benchmark.suites=[]"]
        command += [part for text in sets for part in ("--set", text)]
        environment = {**os.environ, **world, **own}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_caches_that_are_not_shared_are_one_error_at_once(tmp_path: Path) -> None:
    """If each node uses its own disk, every process names the folder and says what to set; nothing is made."""
    caches = [tmp_path / "one", tmp_path / "two"]
    for code, output in launch(caches, [tmp_path / "runs"] * 2):
        assert code == 1, output
        assert "Traceback" not in output
        (error,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert error.startswith("error: not the folder that the first process writes to, on ")
        assert error.endswith(f": {caches[1]}")
        assert "set SPECULATORS_CACHE and --runs to a folder that all nodes share" in output
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_runs_that_are_not_shared_are_one_error_at_once(tmp_path: Path) -> None:
    """Otherwise each process would look for checkpoints where none are written."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for code, output in launch([tmp_path / "cache"] * 2, runs):
        assert code == 1, output
        assert f": {runs[1]}\n" in output
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_check_leaves_no_files(tmp_path: Path) -> None:
    """With shared folders the launch proceeds, and the check leaves no trace."""
    assert [code for code, _ in launch([tmp_path / "cache"] * 2, [tmp_path / "runs"] * 2)] == [0, 0]
    assert list(tmp_path.rglob("train.json"))
    assert list(tmp_path.rglob(".shared-*")) == []
