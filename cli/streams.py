"""Standard output and standard error, which outlive their reader, and the errors printed there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from speculators.errors import Problem


class UntilClosed:
    """A stream that goes silent when its reader leaves (`spec run RECIPE 2>&1 | head`): the work behind it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        with self._silenced():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still buffered must not raise again, neither now nor at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    @classmethod
    @contextlib.contextmanager
    def both(cls) -> Iterator[None]:
        """Protects standard output and standard error inside the block."""
        out, err = cls(sys.stdout), cls(sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


def print_problems(problems: Sequence[Problem], lines: Sequence[str], *, as_json: bool) -> None:
    """Prints errors on standard error, and with `--json` also as one object on standard output."""
    print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
    if as_json:
        print(json.dumps({"errors": [problem_values(problem) for problem in problems]}, indent=2))


def problem_values(problem: Problem) -> dict[str, Any]:
    """Converts a problem to JSON values."""
    return {
        "file": problem.file,
        "line": problem.line,
        "path": problem.path,
        "message": problem.message,
        "hint": problem.hint,
    }
