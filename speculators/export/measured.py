"""What the run of a speculator knows about it: its benchmark, its recipe, its lock."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.recipe.lock import Lock


@attrs.frozen(kw_only=True)
class Background:
    """Where a speculator comes from, as far as files beside it tell.

    Attributes:
        run: the run folder's name; None for a speculator outside of one.
        settings: of its benchmarks, as JSON values.
        recipe: its text.
        lock: None where there is none that can be read.
        unread: files of the run that are left out, in words.
    """

    run: str | None = None
    settings: tuple[dict[str, Any], ...] = ()
    recipe: str | None = None
    lock: Lock | None = None
    unread: tuple[str, ...] = ()


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
