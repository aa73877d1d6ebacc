"""Translates tensor names between another format and ours, by one table read in both directions."""

from __future__ import annotations

import attrs


@attrs.frozen
class TensorNames:
    """The tensor names of a format.

    Attributes:
        table: pairs (theirs, ours); the first match wins. A name that ends in a dot stands for all names with that
            prefix, any other name for itself. An empty `ours` marks a tensor to leave out, which no draft depends on.
        before: prefixes that some writers put before every name ("model.").
    """

    table: tuple[tuple[str, str], ...]
    before: tuple[str, ...] = ()

    def ours(self, name: str) -> str | None:
        """Translates a name of the format into ours: "" for a tensor to leave out, None for an unknown one."""
        for prefix in self.before:
            name = name.removeprefix(prefix)
        return _translated(name, self.table)

    def theirs(self, name: str) -> str | None:
        """Translates one of our names into the format's; None if the format has no such tensor."""
        return _translated(name, tuple((ours, theirs) for theirs, ours in self.table if ours))


def unchanged(*names: str) -> tuple[tuple[str, str], ...]:
    """Rows of a table for tensors that the format names as we do."""
    return tuple((name, name) for name in names)


def _translated(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for source, target in table:
        if name == source:
            return target
        if source.endswith(".") and name.startswith(source):
            return target and target + name.removeprefix(source)
    return None
