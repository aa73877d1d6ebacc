"""Runs `spec` in this process, with its own folders."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from speculators.cli import main

WEIGHTS = Path("speculator/model.safetensors")


@attrs.frozen
class Outcome:
    """The exit code and the output of a command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Spec:
    """Calls `main`, as the shell would, with a cache and a runs folder below `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self.runs, self.cache = home, home / "runs", home / "cache"

    def __call__(self, *arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("SPECULATORS_CACHE", str(self.cache))
            code = main([str(argument) for argument in arguments])
        return Outcome(code, out.getvalue(), err.getvalue())

    def run(self, *arguments: object) -> Outcome:
        return self("run", "smoke", "--runs", self.runs, *arguments)

    def weights(self) -> bytes:
        """Reads the speculator of the only run."""
        (folder,) = self.runs.glob("*-*")
        return (folder / WEIGHTS).read_bytes()

    def half_written(self) -> list[str]:
        """Lists the files that only an unfinished write leaves behind."""
        marks = (".tmp", ".partial")
        paths = [path for path in self.home.rglob("*") if path.name.endswith(marks) or path.name.startswith("writing-")]
        return [str(path) for path in paths]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Reads the events of one class from a run's log."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
