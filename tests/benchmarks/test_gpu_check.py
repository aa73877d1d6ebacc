"""The GPU check goes on whatever happens to one of its parts; tests/standin runs the parts themselves."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import attrs
import pytest
import torch

ROOT = Path(__file__).parents[2]
# Takes the place of the interpreter that runs a part, whose name is its third argument.
PROGRAM = """
import json, os, sys, time

def line(name, verdict):
    print("RESULT " + json.dumps({"name": name, "verdict": verdict, "figures": {"ms": 1.5}}), flush=True)

part = sys.argv[3]
line("first", {"bits": "failed", "suites": "skipped"}.get(part, "passed"))
if part == "device":
    time.sleep(600)
elif part == "kernels":
    print("illegal memory access", file=sys.stderr, flush=True)
    os.abort()
elif part == "bits":
    line("second", "passed")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/gpu, which the installed package does not contain."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


def test_no_part_stops_another(gpu, tmp_path, monkeypatch, capsys):
    """A part that hangs ends at its limit, one that crashes fails, and both keep what they had shown."""
    program, file, check = tmp_path / "program.py", tmp_path / "check.json", gpu("check")
    program.write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(gpu("command"), "PYTHON", [sys.executable, str(program)])
    # A hang takes all of its limit; a start of Python on a busy machine must fit in.
    monkeypatch.setattr(check, "PARTS", tuple(attrs.evolve(part, seconds=3) for part in check.PARTS[:5]))
    assert check.main(["--json", str(file)]) == 1
    document = json.loads(file.read_text(encoding="utf-8"))
    verdicts = {part["name"]: part["verdict"] for part in document["parts"]}
    hung, crashed, *_ = document["parts"]
    assert list(verdicts.values()) == ["failed", "failed", "failed", "skipped", "passed"]
    assert document["failed"] == ["device", "kernels", "bits"]
    assert hung["reason"] == "ended at its time limit of 3 s"
    assert hung["lines"][0]["figures"] == {"ms": 1.5}
    assert crashed["reason"].endswith("illegal memory access")
    assert crashed["lines"][0]["verdict"] == "passed"
    assert "illegal memory access" in capsys.readouterr().out


def test_parts_that_do_not_fit_are_skipped_with_the_reason(gpu, tmp_path):
    """Without time, nothing is begun and nothing failed."""
    file = tmp_path / "check.json"
    assert gpu("check").main(["--minutes", "0.01", "--json", str(file)]) == 0
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert len(parts) == len(gpu("check").PARTS)
    assert all(part["verdict"] == "skipped" and "of --minutes 0.01 are left" in part["reason"] for part in parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
def test_without_a_gpu_the_check_fails(gpu, tmp_path):
    """Real shapes are never tried on a CPU."""
    file = tmp_path / "check.json"
    assert gpu("check").main(["--only", "kernels", "--json", str(file)]) == 1
    (part,) = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert "torch sees no GPU" in part["lines"][0]["reason"]


def test_every_part_has_a_module_with_lines(gpu):
    """The name of a part is that of the module that a process of its own imports."""
    assert all(callable(gpu(part.name).lines) for part in gpu("check").PARTS)


def test_the_busy_share_counts_kernels_at_the_same_time_once(gpu):
    """Time is covered by one kernel, by two, or by one within another."""
    assert gpu("step").union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0


def test_a_case_that_raises_is_one_failed_line(gpu):
    """The line says what was raised and where."""
    line = gpu("lines").judged("case", lambda: ({}, str(1 / 0)))
    assert (line.verdict, line.figures) == ("failed", {})
    assert line.reason.startswith("ZeroDivisionError: division by zero (test_gpu_check.py:")
