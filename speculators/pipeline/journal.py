"""Keeps the answers of a run that may be killed: appended to a file, and read back by the run that goes on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from speculators.files.disk import disk_errors

# (index of the conversation, number of its turn).
Key = tuple[int, int]


class AnswerJournal(Mapping[Key, list[int]]):
    """Answers by conversation and turn, one line each, after a line of what determines them.

    Memory holds only where each line starts, so that a million answers stay on the disk until they are asked for.

    Args:
        path: of the file, which another run may have left.
        facts: what determines the answers; a file with other facts is replaced.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._starts: dict[Key, int] = {}
        self._end = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.has(path, facts):
                self._read()
            else:
                self._append([{"facts": facts}])

    @staticmethod
    def has(path: Path, facts: Mapping[str, Any]) -> bool:
        """Whether a file has answers that the same facts determine."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            first = _line(file.readline())
        return first is not None and first.get("facts") == json.loads(json.dumps(facts))

    def add(self, answers: Iterable[tuple[Key, list[int]]]) -> None:
        """Appends answers; they are on the disk when this returns.

        Raises:
            ArtifactError: the disk is full, or the file cannot be written.
        """
        new = dict(answers)
        starts = self._append([{"row": row, "turn": turn, "answer": answer} for (row, turn), answer in new.items()])
        self._starts |= zip(new, starts, strict=True)

    def __getitem__(self, key: Key) -> list[int]:
        """Reads an answer from the file."""
        start = self._starts[key]
        with disk_errors(self.path), self.path.open("rb") as file:
            file.seek(start)
            answer: list[int] = json.loads(file.readline())["answer"]
        return answer

    def __iter__(self) -> Iterator[Key]:
        """Iterates over conversation and turn of each answer."""
        return iter(self._starts)

    def __len__(self) -> int:
        """Counts the answers."""
        return len(self._starts)

    def _read(self) -> None:
        """Reads up to the first line that is torn; a kill in the middle of `add` leaves one at the end."""
        with self.path.open("rb") as file:
            self._end = len(file.readline())
            for line in file:
                entry = _line(line)
                if entry is None:
                    break
                self._starts[entry["row"], entry["turn"]] = self._end
                self._end += len(line)

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> list[int]:
        """Appends a line for each entry; returns where each starts."""
        lines = [(json.dumps(entry) + "\n").encode() for entry in entries]
        with disk_errors(self.path), self.path.open("r+b" if self._end else "wb") as file:
            # Whatever follows the last whole line is torn.
            file.truncate(self._end)
            file.seek(self._end)
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        *starts, self._end = itertools.accumulate(map(len, lines), initial=self._end)
        return starts


def _line(line: bytes) -> dict[str, Any] | None:
    """Parses a whole line; None if it is torn."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
