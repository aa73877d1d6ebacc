"""The one Console, with styles named by meaning. Importing this imports Rich, so verbs import it when they print."""

from __future__ import annotations

import functools

from rich.console import Console
from rich.theme import Theme

STYLES = {
    "title": "bold",
    "name": "cyan",
    "number": "green",
    "note": "dim",
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "mask": "bold green",
    "supervised": "green underline",
    "special": "magenta",
    "supervised special": "bold magenta underline",
}

# People search piped output line by line, so it must not be wrapped at the 80 columns that Rich assumes.
PIPED_WIDTH = 200


class PipeConsole(Console):
    """A Console that leaves a closed pipe to the CLI, where Rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError again that Rich has caught."""
        raise BrokenPipeError


@functools.cache
def console(*, stderr: bool = False) -> Console:
    """Makes the Console for results, or the one for progress and errors (`stderr`), once per process."""
    made = PipeConsole(stderr=stderr, theme=Theme(STYLES), highlight=False)
    if not made.is_terminal:
        made.width = PIPED_WIDTH
    return made
