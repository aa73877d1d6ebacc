"""Parses rows of JSON one at a time, in constant memory: a row that cannot be used never costs the others."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import attrs

from speculators.errors import DataError

# A longer line is no conversation; it is passed over without being held in memory.
LONGEST_BYTES = 32 << 20
# Templates and JSON writers recurse into a row, so its nesting must stay far below the interpreter's limit.
DEEPEST = 64
_CHUNK = 1 << 16

NOT_JSON = "not a JSON object"
TOO_LONG = f"longer than {LONGEST_BYTES >> 20} MiB"
TOO_DEEP = f"nested more than {DEEPEST} levels deep"
REPEATED_KEY = "a key occurs twice in one object"
LONE_SURROGATE = "half of a character (a lone surrogate such as \\ud83d)"


@attrs.frozen
class Unusable:
    """Stands for a row that cannot be read, with the reason."""

    reason: str


class _RepeatedKey(Exception):
    """Two values for one key: which is meant cannot be known."""


def parse_json(line: bytes) -> Any:
    """Parses one row; returns `Unusable` for one that is not JSON, repeats a key, or is nested without end."""
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except _RepeatedKey:
        return Unusable(REPEATED_KEY)
    except RecursionError:
        return Unusable(TOO_DEEP)
    except ValueError:
        return Unusable(NOT_JSON)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _RepeatedKey
    return values


def flaw(value: Any, levels: int = DEEPEST) -> str:
    """Describes what no tokenizer, template or file could take, anywhere in a value; "" if there is nothing."""
    if isinstance(value, str):
        return "" if _encodes(value) else LONE_SURROGATE
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return ""
    if not levels:
        return TOO_DEEP
    return next((fault for part in parts if (fault := flaw(part, levels - 1))), "")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields (line number, row) of JSONL; blank lines are passed over, but counted."""
    number = 0
    while line := file.readline(LONGEST_BYTES + 1):
        number += 1
        if len(line) > LONGEST_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            yield number, Unusable(TOO_LONG)
        elif line.strip():
            yield number, parse_json(line)


def json_array(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yields (place from 1, element) of one JSON array.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: an element is not JSON, or the file ends inside the array: the rest cannot be read.
    """
    text = _Text(file)
    text.next_sign()  # [
    number, sign = 0, ","
    empty = text.peek() == "]"
    while not empty and sign == ",":
        number += 1
        try:
            value = text.element()
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            reason = TOO_DEEP if isinstance(error, RecursionError) else "not JSON, or cut short"
            hint = "write one JSON object per line (.jsonl): then a bad row costs only itself"
            raise DataError(f"{name}: element {number} of the array: {reason}", hint=hint) from None
        yield number, value
        sign = text.next_sign()
    if not empty and sign != "]":
        ending = f"comes {sign!r}, not , or ]" if sign else "the file ends: it is cut short"
        raise DataError(f"{name}: damaged: after element {number} of the array {ending}")


class _Text:
    """A JSON text, read as far as it is needed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self.buffer = ""

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        self.buffer = self.buffer.lstrip()
        while not self.buffer and self._read(_CHUNK):
            self.buffer = self.buffer.lstrip()
        return self.buffer[:1]

    def next_sign(self) -> str:
        """Takes the next character that is not white space."""
        sign = self.peek()
        self.buffer = self.buffer[1:]
        return sign

    def element(self) -> Any:
        """Takes one element; raises ValueError where none can be completed."""
        self.peek()
        while True:
            try:
                value, end = _decoded(self.buffer)
                if end < len(self.buffer):  # a number at the end of the buffer may go on behind it
                    self.buffer = self.buffer[end:]
                    return value
            except ValueError:
                if len(self.buffer) > LONGEST_BYTES:
                    raise
            # Twice as much each time, so that a long element is parsed again only a few times.
            if not self._read(max(_CHUNK, len(self.buffer))):
                raise ValueError(NOT_JSON)

    def _read(self, size: int) -> bool:
        chunk = self.file.read(size)
        self.buffer += chunk
        return bool(chunk)


def _decoded(text: str) -> tuple[Any, int]:
    """Parses the value that a text starts with; returns it with the place where it ends."""
    try:
        return _DECODER.raw_decode(text)
    except _RepeatedKey:
        return Unusable(REPEATED_KEY), json.JSONDecoder().raw_decode(text)[1]


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
