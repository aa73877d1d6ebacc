"""Refuses a source whose files changed between planning, when they are hashed, and the end of reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators.errors import DataError
from speculators.files.disk import disk_errors
from speculators.recipe.fingerprint import file_hashes, source_identity
from speculators.recipe.input_sections import DataSource
from speculators.recipe.source_files import locate_files

HINT = "run the command again to use the files as they are now, or put the former files back first"


def with_identities(
    sources: Sequence[DataSource], planned: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[DataSource, Mapping[str, Any]]]:
    """Pairs each source with its identity in the plan, {} where there is no plan."""
    return zip(sources, planned or [{}] * len(sources), strict=True)


@contextmanager
def as_planned(source: DataSource, planned: Mapping[str, Any]) -> Iterator[None]:
    """Checks, before and after the block reads a source, that its files are those that the plan identifies.

    Data read from another file would be stored under the fingerprint of the planned one. Hashing while reading would
    not do, because a source with `take` is not read to its end.

    Args:
        source: with an absolute path.
        planned: its identity in the plan; {} where there is no plan.

    Raises:
        DataError: a file was edited, added or removed; names the first.
    """
    then = file_hashes(planned)
    if not then:  # nothing is planned, or a hub's data set, which its revision identifies
        yield
        return
    before = _states(source)
    _refuse_changes(source, then)
    yield
    _refuse_changes(source, then)
    # An edit that was undone while the file was read leaves the hash as it was, but not the time.
    if _states(source) != before:
        raise DataError(f"{source.path}: changed while it was read", hint=HINT)


def _refuse_changes(source: DataSource, then: Mapping[str, str]) -> None:
    now = file_hashes(source_identity(source))
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            path = Path(source.path) / name if name else source.path
            raise DataError(f"{path}: changed after the plan was made", hint=HINT)


def _states(source: DataSource) -> Sequence[tuple[str, int, int, int]]:
    with disk_errors(Path(source.path)):
        stats = [(file.name, file.path.stat()) for file in locate_files(Path(source.path), source.split)]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
