"""Reads the rows of sources one at a time, from files or from a data set hub, and counts unusable ones by reason."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import LAYOUT, NO_MESSAGES, parse, reasons_text
from speculators.data.json_rows import Unusable, flaw
from speculators.data.mapping import map_row, suggest_map
from speculators.data.messages import Conversation
from speculators.data.row_files import read_rows, row_count
from speculators.errors import DataError
from speculators.files.disk import file_sha256
from speculators.recipe.input_sections import DataSource
from speculators.recipe.source_files import SourceFile, is_whole_file, locate_files


@attrs.frozen
class SourceRow:
    """One row of a source.

    Attributes:
        name: the id of a row that states none.
        place: file and line, for messages.
        written: the row as it was in the source, before the map.
        value: the row in the layout of conversations, after the source's `map`; plain text is a conversation already.
    """

    name: str
    place: str
    written: Any
    value: Mapping[str, Any] | Conversation | Unusable

    @classmethod
    def of(cls, source: DataSource, written: Any, *, name: str, place: str) -> SourceRow:
        """Applies the map of the source, and finds what no stage could take."""
        value = written
        if source.map is not None and not isinstance(written, Unusable):
            value = map_row(source.map, written, name)
        if not isinstance(value, Conversation | Mapping | Unusable):
            value = Unusable("not a JSON object")
        if reason := flaw(attrs.astuple(value) if isinstance(value, Conversation) else value):
            value = Unusable(reason)
        if isinstance(value, Mapping):
            value = {key: part for key, part in value.items() if part is not None}
        return cls(name, place, written, value)

    def conversation(self) -> Conversation | str:
        """Parses the row, or returns the reason why it cannot be used."""
        if isinstance(self.value, Conversation):
            return self.value
        if isinstance(self.value, Unusable):
            return self.value.reason
        parsed = parse(self.value, self.name)
        if isinstance(parsed, str):
            return parsed
        # Arguments and tools may come as JSON inside a text, which was not parsed until now.
        inside = [dict(call.arguments) for message in parsed.messages for call in message.tool_calls]
        return flaw([inside, parsed.tools]) or parsed


def stream_source(source: DataSource, base: Path, skipped: Counter[str]) -> Iterator[Conversation]:
    """Yields the usable conversations among the first `source.take` rows of the split; counts the others.

    Args:
        source: files, or a data set of the hub.
        base: the folder that relative paths start from.
        skipped: gets the number of unusable rows added, by reason.

    Raises:
        DataError: the source is missing, empty or damaged, is not the file that its sha256 names, or has no usable row.
    """
    reasons: Counter[str] = Counter()
    usable, example = 0, None
    for row in source_rows(source, base):
        conversation = row.conversation()
        if isinstance(conversation, str):
            reasons[conversation] += 1
            skipped[conversation] += 1
            example = row.written if example is None and conversation == NO_MESSAGES else example
        else:
            usable += 1
            yield conversation
    if not usable:
        hint = suggest_map(example) or LAYOUT
        raise DataError(
            f"{source.path}: none of its {reasons.total()} rows can be used: {reasons_text(reasons)}", hint=hint
        )


def read_source(source: DataSource, base: Path) -> tuple[list[Conversation], Counter[str]]:
    """Reads all usable conversations of a small source at once, with the counts of the others."""
    skipped: Counter[str] = Counter()
    return list(stream_source(source, base, skipped)), skipped


def source_rows(source: DataSource, base: Path) -> Iterator[SourceRow]:
    """Yields the first `take` rows of the split; raises like `stream_source`."""
    if (source.revision if source.is_local else source.sha256) is not None:
        raise DataError(f"{source.path}: wrong kind of pin: a file is pinned by sha256, a data set by revision")
    if source.is_local and source.subset is not None:
        raise DataError(f"{source.path}: a subset is part of a data set of the hub; files have splits")
    rows = _file_rows(source, base) if source.is_local else _dataset_rows(source)
    return itertools.islice(rows, source.take)


def count_rows(source: DataSource, base: Path) -> int | None:
    """Counts the rows of a source, usable or not; None if a data set of the hub is used whole."""
    if not source.is_local:
        return source.take
    if source.split is None:
        files = locate_files(_path(source, base), None)
        stated = [count for count in (row_count(file.path) for file in files) if count is not None]
        if len(stated) == len(files):
            return min(sum(stated), source.take or sum(stated))
    return sum(1 for _ in source_rows(source, base))


def _path(source: DataSource, base: Path) -> Path:
    return base / Path(source.path).expanduser()


def _file_rows(source: DataSource, base: Path) -> Iterator[SourceRow]:
    path = _path(source, base)
    files = locate_files(path, source.split)
    if is_whole_file(path):
        _check_sha256(source, path)
    splits: Counter[str] = Counter()
    for file in files:
        for number, row in read_rows(file.path):
            split = _split(file, row)
            splits[split] += 1
            if source.split in (None, split):
                yield SourceRow.of(source, row, name=f"{file.stem}:{number}", place=f"{file.path}:{number}")
    if not splits:
        raise DataError(f"{path}: empty: it has no rows")
    if source.split is not None and not splits[source.split]:
        others = Counter({repr(name) if name else "without a split": n for name, n in splits.items() if n})
        raise DataError(f"{path}: no row has split {source.split!r}; available: {reasons_text(others)}")


def _split(file: SourceFile, row: Any) -> str:
    if file.split is not None:
        return file.split
    stated = row.get("split") if isinstance(row, Mapping) else None
    return str(stated) if stated is not None else file.otherwise or ""


def _check_sha256(source: DataSource, path: Path) -> None:
    if source.sha256 is not None and (digest := file_sha256(path)) != source.sha256:
        raise DataError(f"{path}: its sha256 is {digest}, but the recipe says {source.sha256}")


def _dataset_rows(source: DataSource) -> Iterator[SourceRow]:
    """Yields the rows of a data set of the hub, which the library `datasets` loads."""
    try:
        import datasets
    except ImportError:
        hint = "pip install 'spec-recipes[datasets]', or give a JSONL file (./name.jsonl)"
        raise DataError(f"{source.path}: reading a data set needs the library `datasets`", hint=hint) from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            source.path, source.subset, split=source.split or "train", revision=source.revision
        )
    except Exception as error:  # the library has no base class for its errors: network, names, splits, parsers
        hint = "check the id, the split and the network; a local folder is written ./name"
        raise DataError(f"{source.path}: cannot be loaded: {type(error).__name__}: {error}", hint=hint) from error
    if not len(loaded):
        raise DataError(f"{source.path}: empty: split {source.split or 'train'!r} has no row")
    stem = Path(source.path).name
    for number, row in enumerate(loaded):
        yield SourceRow.of(source, row, name=f"{stem}:{number}", place=f"{source.path}:{number}")
