"""What the run of a speculator knows about it: its benchmark, its recipe, its lock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Background:
    """Where a speculator comes from, as far as files beside it tell.

    Attributes:
        run: the run folder's name; None for a speculator outside of one.
        settings: of the newest benchmark, as JSON values.
        recipe: its text.
        lock: as JSON values.
    """

    run: str | None = None
    settings: tuple[dict[str, Any], ...] = ()
    recipe: str | None = None
    lock: dict[str, Any] | None = None

    @classmethod
    def of(cls, speculator: Path) -> Background:
        """Reads it off the run that the speculator is in."""
        run = speculator.absolute().parent
        if speculator.absolute().name != "speculator" or not (run / "plan.json").is_file():
            return cls()
        files = sorted((run / "bench").glob("*.json"), key=lambda file: file.stat().st_mtime)
        bench = _json(files[-1]) if files else None
        text = run / "recipe.toml"
        return cls(
            run=run.name,
            settings=tuple(bench["settings"]) if bench else (),
            recipe=text.read_text(encoding="utf-8") if text.is_file() else None,
            lock=_json(run / "lock.json"),
        )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def acceptance_table(settings: tuple[dict[str, Any], ...]) -> list[str]:
    """Returns a Markdown table of acceptance lengths, and below it the definition of each."""
    rows = ["| suite | prompts | K | T | tau (95%) | live | accepted by position |", "|---|---|---|---|---|---|---|"]
    for each in settings:
        exact, live = each["exact"], each["live"]
        low, high = exact["tau_interval"]
        told = f"{live['acceptance']['tau']:.3f}" if live else ""
        places = " ".join(f"{rate:.2f}" for rate in exact["by_position"] if rate is not None)
        rows.append(
            f"| {each['suite']} | {exact['prompts']} | {each['num_speculative_tokens']} | {each['temperature']:g} "
            f"| {exact['tau']:.3f} ({low:.2f} to {high:.2f}) | {told} | {places} |"
        )
    definitions = dict.fromkeys(each["definition"] for each in settings)
    return [*rows, "", *(f"* {definition}" for definition in definitions)]
