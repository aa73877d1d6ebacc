"""The one Console, with styles named by meaning. Importing this imports Rich, so verbs import it when they print."""

from __future__ import annotations

import functools

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
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
    "drafted": "green",
    # Parts of a conversation that spec data shows, by their names in inspection/kinds.py.
    "reasoning": "yellow",
    "supervised reasoning": "yellow underline",
    "tool calls": "cyan",
    "supervised tool calls": "cyan underline",
    "tool results": "blue",
    "supervised tool results": "blue underline",
}

# People search piped output line by line, so it must not be wrapped at the 80 columns that Rich assumes.
PIPED_WIDTH = 200
UNLIMITED = 10_000


class PipeConsole(Console):
    """A Console that leaves a closed pipe to the CLI, where Rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError again that Rich has caught."""
        raise BrokenPipeError


class Uncut:
    """Renders at its full width what is wider than the terminal, which breaks the lines; print it with crop=False."""

    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders it as wide as it would like to be."""
        natural = Measurement.get(console, options.update(max_width=UNLIMITED), self.renderable).maximum
        yield from console.render(self.renderable, options.update(width=max(natural, options.max_width)))


@functools.cache
def console(*, stderr: bool = False) -> Console:
    """Makes the Console for results, or the one for progress and errors (`stderr`), once per process."""
    made = PipeConsole(stderr=stderr, theme=Theme(STYLES), highlight=False)
    if not made.is_terminal:
        made.width = PIPED_WIDTH
    return made
