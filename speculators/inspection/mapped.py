"""Says how rows are trained on that a source's `map` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from speculators.inspection.survey import short_path
from speculators.inspection.view import NOTE, DataFinding
from speculators.recipe.input_sections import DataSource


def mapped_rows(sources: Iterable[DataSource], rows: Mapping[str, int]) -> Iterator[DataFinding]:
    """Yields a note for each source whose rows are plain text, or prompts and completions.

    Args:
        rows: number of rows by the recipe's path of the source.
    """
    for source in sources:
        mapped = source.map.present() if source.map else {}
        place = f"{short_path(source.path)}: {rows.get(source.path, 0):,} rows"
        if "text" in mapped:
            message = f"{place} are plain text: no chat template is applied, every token is supervised but the first"
            yield DataFinding(rule="plain text", level=NOTE, message=message)
        elif "prompt" in mapped:
            turns = "a user's turn" if "completion" not in mapped else "a user's turn and the assistant's answer"
            message = f"{place} become {turns}, rendered with the chat template"
            yield DataFinding(rule="prompt and completion", level=NOTE, message=message)
