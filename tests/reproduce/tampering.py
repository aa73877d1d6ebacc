"""Editing what a run kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import Outcome


def edited(file: Path, edit: Callable[[Any], None]) -> None:
    """Rewrites a JSON file."""
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def edited_event(run: Path, kind: str, step: int, edit: Callable[[dict], None]) -> None:
    """Rewrites the last record of one update or evaluation in a log."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    edit([line for line in lines if line["event"] == kind and line["step"] == step][-1])
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def differing(outcome: Outcome) -> list[tuple[str, str]]:
    return [
        (finding["stage"], finding["check"]) for finding in outcome.json["findings"] if finding["result"] == "differs"
    ]
