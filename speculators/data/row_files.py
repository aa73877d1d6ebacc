"""Reads the rows of one file: JSONL or JSON, also with .gz or .zst, Parquet or Arrow; its first bytes tell which."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from speculators.data.json_rows import json_array, json_lines
from speculators.errors import DataError

PARQUET, ARROW, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Formats that are recognised only to be refused with what to do.
ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
START_BYTES = 8192
# Rows of a Parquet or Arrow file that are held as Python objects at once.
BATCH_ROWS = 64


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or row number from 1, row) of a file, in constant memory; a bad row is an `Unusable`.

    Raises:
        DataError: the file is damaged, cut short, or of no known format, or a library that reads it is not installed.
    """
    with _read_errors(path), path.open("rb") as file:
        start = file.read(START_BYTES)
        file.seek(0)
        if start.startswith((PARQUET, ARROW, ARROW_STREAM)):
            yield from _table_rows(path, start)
        else:
            yield from _text_rows(path, file, start)


def row_count(path: Path) -> int | None:
    """Reads the number of rows where the file states it, which only Parquet does; None otherwise."""
    with _read_errors(path), path.open("rb") as file:
        if not file.read(len(PARQUET)).startswith(PARQUET):
            return None
        count: int = _arrow(path, "parquet").ParquetFile(path).metadata.num_rows
        return count


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turns what the readers of the block raise into a DataError that names the file."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or cut short: {error}", hint="fetch or write it again") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's
            raise DataError(f"{path}: damaged or cut short: {error}", hint="fetch or write it again") from None
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}", hint=f"find its encoding; iconv converts {path.name}") from None
    except (ValueError, NotImplementedError) as error:  # pyarrow's errors derive from them
        raise DataError(f"{path}: damaged: {error}", hint="fetch or write it again") from None


def _text_rows(path: Path, file: BinaryIO, start: bytes) -> Iterator[tuple[int, Any]]:
    if start.startswith(GZIP):
        stream: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=file))
    elif start.startswith(ZSTD):
        stream = io.BufferedReader(_arrow(path, "lib").CompressedInputStream(file, "zstd"))
    else:
        stream = file
    # A peek may give less than one asks for, but never nothing while there is something.
    start = stream.peek(START_BYTES)  # type: ignore[attr-defined]
    _check_text(path, start)
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
        yield from json_array(stream, str(path))
    else:
        yield from json_lines(stream)


def _check_text(path: Path, start: bytes) -> None:
    if kind := next((kind for magic, kind in ARCHIVES.items() if start.startswith(magic)), None):
        raise DataError(f"{path}: a {kind} archive, which is not read", hint="extract it, and name the files in it")
    if start[257:262] == b"ustar":
        raise DataError(f"{path}: a tar archive, which is not read", hint="extract it, and name the files in it")
    if start.startswith(UTF_16):
        raise DataError(f"{path}: UTF-16, not UTF-8", hint=f"iconv -f utf-16 -t utf-8 {path.name} > utf8-{path.name}")
    if b"\0" in start:
        hint = "write one JSON object per line, in UTF-8; .gz and .zst are read, too"
        raise DataError(f"{path}: binary, not JSONL, JSON, Parquet or Arrow", hint=hint)


def _table_rows(path: Path, start: bytes) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in _batches(path, start):
        for first in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(first, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row


def _batches(path: Path, start: bytes) -> Iterator[Any]:
    if start.startswith(PARQUET):
        with _arrow(path, "parquet").ParquetFile(path) as parquet:
            yield from parquet.iter_batches(batch_size=BATCH_ROWS)
        return
    ipc = _arrow(path, "ipc")
    with _arrow(path, "lib").memory_map(str(path)) as source:
        if start.startswith(ARROW):
            reader = ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(source)


def _arrow(path: Path, module: str) -> Any:
    """Imports a module of pyarrow, which only these formats need."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        hint = "pip install 'spec-recipes[datasets]'"
        raise DataError(f"{path}: reading this format needs the library `pyarrow`", hint=hint) from None
    return getattr(pyarrow, module)
