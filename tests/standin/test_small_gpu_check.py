"""benchmarks/gpu/check.py, which waits for a GPU, runs at tiny shapes on the stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process for each part.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
PARTS = ("device", "kernels", "decode")


def test_the_check_runs_its_parts_on_the_device_and_files_every_line(hooks, tmp_path):
    """Kernels are on cuda:0 and close to their references; a part that needs another's output is skipped, with why."""
    file = tmp_path / "check.json"
    environment = {**os.environ, "LD_PRELOAD": str(hooks), "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "program.py"), "-m", "benchmarks.gpu.check", "--small", "--minutes", "30"]
    command += ["--json", str(file), "--only", *PARTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [(part["name"], part["verdict"]) for part in document["parts"]] == [
        ("device", "passed"),
        ("kernels", "passed"),
        ("decode", "skipped"),
    ]
    device, kernels, decode = (part["lines"] for part in document["parts"])
    assert device[0]["figures"]["name"] == "stand-in"
    assert len(kernels) == 16
    assert all(0 < line["figures"]["relative_error"] < 0.02 for line in kernels)
    assert "the part online did not run" in decode[0]["reason"]
    assert all(name in done.stdout for name in (*PARTS, *(line["name"] for line in kernels)))
