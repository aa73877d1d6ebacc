"""Reads conversations from JSONL files and data set hubs one at a time, counting unusable rows by reason."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speculators.data.layouts import read_documents, read_messages, read_tools
from speculators.data.messages import Conversation
from speculators.data.written import read_written
from speculators.errors import DataError
from speculators.files.disk import file_sha256
from speculators.recipe.input_sections import DataSource

NO_MESSAGES = "no messages"
NO_ANSWER = "no assistant turn"


def prompt_key(text: str) -> str:
    """Hashes a prompt without case, width and spacing, so that equal keys mean the same question."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def parse(row: Any, name: str) -> Conversation | str:
    """Parses a row into a conversation, or returns the reason why it cannot be used.

    Args:
        row: a dict with `messages` (role, content) or `conversations` (from, value); `id`, `category`, `tools` and
            `documents` are optional. See `layouts`.
        name: the id for a row without one.
    """
    if not isinstance(row, Mapping):
        return "not a JSON object"
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list):
        return NO_MESSAGES
    messages, tools, documents = read_messages(turns), read_tools(row), read_documents(row)
    if isinstance(messages, str):
        return messages
    if isinstance(tools, str) or isinstance(documents, str):
        return tools if isinstance(tools, str) else str(documents)
    while messages and messages[-1].role != "assistant":
        messages.pop()  # a question without an answer supervises nothing
    if not messages:
        return NO_ANSWER
    written = read_written(row, messages)
    if isinstance(written, str):
        return written
    return Conversation(
        str(row.get("id", name)),
        str(row.get("category", "")),
        tuple(messages),
        tools=tools,
        documents=documents,
        written=written,
    )


def stream_source(source: DataSource, base: Path, skipped: Counter[str]) -> Iterator[Conversation]:
    """Yields the usable conversations among the first `source.take` rows of the split; counts the others.

    Args:
        source: a JSONL file, whose rows are filtered by their field `split`, or a hub id (or folder) for `datasets`,
            whose split defaults to "train".
        base: the folder that relative paths start from.
        skipped: gets the number of unusable rows added, by reason.

    Raises:
        DataError: the source is missing, empty, binary, has a different sha256 from the recipe's, or has no usable row.
    """
    stem = source_stem(source, base)
    reasons: Counter[str] = Counter()
    usable = 0
    for number, row in source_rows(source, base):
        conversation = parse(row, f"{stem}:{number}")
        if isinstance(conversation, str):
            reasons[conversation] += 1
            skipped[conversation] += 1
        else:
            usable += 1
            yield conversation
    if not usable:
        raise DataError(
            f"{source.path}: none of its {reasons.total()} rows can be used: {reasons_text(reasons)}", hint=LAYOUT
        )


def source_rows(source: DataSource, base: Path) -> Iterator[tuple[int, Any]]:
    """Iterates over (line or row number, row) of the first `take` rows of the split; raises like `stream_source`."""
    path = base / Path(source.path).expanduser()
    is_file = _reads_file(source, path)
    if (source.revision if is_file else source.sha256) is not None:
        raise DataError(f"{source.path}: wrong kind of pin: a file is pinned by sha256, a data set by revision")
    return itertools.islice(jsonl_rows(source, path) if is_file else _dataset_rows(source, path), source.take)


def source_stem(source: DataSource, base: Path) -> str:
    """Returns the prefix of ids for rows without one, which are called `source_stem:number`."""
    path = base / Path(source.path).expanduser()
    return path.stem if _reads_file(source, path) else path.name


def _reads_file(source: DataSource, path: Path) -> bool:
    return path.is_file() or (source.is_file and not path.is_dir())


LAYOUT = 'a row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def read_source(source: DataSource, base: Path) -> tuple[list[Conversation], Counter[str]]:
    """Reads all usable conversations of a small source at once, with the counts of the others."""
    skipped: Counter[str] = Counter()
    return list(stream_source(source, base, skipped)), skipped


def reasons_text(reasons: Mapping[str, int]) -> str:
    """Writes counts by reason, largest first: "3 no assistant turn, 1 an empty message"."""
    largest_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in largest_first)


def jsonl_rows(source: DataSource, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, row) of the split's lines; a line that is not JSON gives None as its row.

    Raises:
        DataError: the file is missing, binary, has a different sha256 from the recipe's, or has no row of the split.
    """
    _check_file(source, path)
    splits: Counter[str] = Counter()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _json(line)
            split = str(row.get("split", "")) if isinstance(row, dict) else ""
            if source.split is not None and split != source.split:
                splits[split] += 1
                continue
            splits[source.split or ""] += 1
            yield number, row
    if not splits:
        raise DataError(f"{path}: empty: it has no rows")
    if source.split is not None and not splits[source.split]:
        others = Counter({repr(name) if name else "without a split": n for name, n in splits.items() if n})
        raise DataError(f"{path}: no row has split {source.split!r}; available: {reasons_text(others)}")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return None


def _check_file(source: DataSource, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint="relative paths start from the recipe's folder")
    with path.open("rb") as file:
        start = file.read(8192)
    if b"\0" in start or start.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: binary, not JSONL", hint="write one JSON object per line, in UTF-8, uncompressed")
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
        raise DataError(f"{path}: a JSON array, not JSONL", hint=f"jq -c '.[]' {path.name} > {path.stem}.jsonl")
    if source.sha256 is not None and (digest := file_sha256(path)) != source.sha256:
        raise DataError(f"{path}: its sha256 is {digest}, but the recipe says {source.sha256}")


def _dataset_rows(source: DataSource, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (row number, row) of a data set, which the `datasets` library loads by hub id or from a local folder."""
    try:
        import datasets
    except ImportError:
        hint = "pip install 'spec-recipes[datasets]', or give a JSONL file (./name.jsonl)"
        raise DataError(f"{source.path}: reading a data set needs the library `datasets`", hint=hint) from None
    datasets.disable_progress_bars()
    name = str(path) if path.is_dir() else source.path
    try:
        loaded = datasets.load_dataset(name, split=source.split or "train", revision=source.revision)
    except Exception as error:  # the library has no base class for its errors: network, names, splits, parsers
        hint = "check the id, the split and the network; the name of a local file must end in .jsonl"
        raise DataError(f"{source.path}: cannot be loaded: {type(error).__name__}: {error}", hint=hint) from error
    if not len(loaded):
        raise DataError(f"{source.path}: empty: split {source.split or 'train'!r} has no row")
    yield from enumerate(loaded)
