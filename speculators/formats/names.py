"""Tensor names of a format beside ours: one table a format, read both ways."""

from __future__ import annotations

import attrs


@attrs.frozen
class Names:
    """The tensor names of a format.

    Attributes:
        table: (theirs, ours), the first that fits counts. Names that end in a dot are beginnings, others are whole.
            Ours is "" for a tensor that says nothing about the draft, and is left out.
        before: what some writers put before every name ("model.").
    """

    table: tuple[tuple[str, str], ...]
    before: tuple[str, ...] = ()

    def ours(self, name: str) -> str | None:
        """Returns our name of a tensor of the format, "" for one that is left out, None for one that it has not."""
        for prefix in self.before:
            name = name.removeprefix(prefix)
        return _translated(name, self.table)

    def theirs(self, name: str) -> str | None:
        """Returns the format's name of one of our tensors, None where it has none."""
        return _translated(name, tuple((ours, theirs) for theirs, ours in self.table if ours))


def _translated(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for source, target in table:
        if name == source:
            return target
        if source.endswith(".") and name.startswith(source):
            return target and target + name.removeprefix(source)
    return None
