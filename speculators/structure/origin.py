"""Where a value of a recipe was written: finds the line of each key of a TOML text by a small scan.

TOML parsers return values without positions, and errors must name a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs
import tomli

Part = str | int
_TABLE = re.compile(r"\s*(\[{1,2})([^\[\]]+)\]{1,2}\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOKEN = re.compile(r"""\"{3}|'{3}|"(?:\\.|[^"\\])*"|'[^']*'|#.*|[\[\]{}]""")


@attrs.frozen
class Origin:
    """Where a value comes from.

    Attributes:
        kind: "recipe", "extends", "--set" or "default".
        file: the file that contains the value; None for the command line and for defaults.
        line: 1-based line in `file`; for a key of an inline table, the line at which the table begins.
        shown: a shorter name of the file for people; "" for `file` itself.
    """

    kind: str
    file: str | None = None
    line: int | None = None
    shown: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.shown or self.file, self.line) if part is not None)
        if self.kind == "extends":
            return f"extends {place}"
        return place if self.kind == "recipe" else self.kind


def path_text(parts: tuple[Part, ...]) -> str:
    """Spells a TOML path as people write it: `data.sources[1].path`, `expect."a/K=5".tau`."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'
            text += f".{key}" if text else key
    return text


def key_lines(text: str) -> dict[tuple[Part, ...], int]:
    """Finds the line of each table and key of a TOML text, ignoring what looks like one inside a value."""
    lines: dict[tuple[Part, ...], int] = {}
    table: tuple[Part, ...] = ()
    arrays: dict[tuple[Part, ...], int] = {}
    depth, quotes = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not depth and not quotes:
            if header := _TABLE.match(line):
                table = _enter(_keys(header.group(2)), arrays, counted=header.group(1) == "[[")
                lines.setdefault(table, number)
            elif key := _KEY.match(line):
                lines[table + _keys(key.group(1))] = number
        depth, quotes = _after(line, depth, quotes)
    return lines


def nearest_line(lines: Mapping[tuple[Part, ...], int], parts: tuple[Part, ...]) -> int | None:
    """The line of a key, or else of the nearest table or key that contains it."""
    while parts:
        if parts in lines:
            return lines[parts]
        parts = parts[:-1]
    return None


def comment_at(text: str, line: int) -> str:
    """The comment at the end of a line of a TOML text, or ""; a `#` inside a string is not one."""
    lines = text.splitlines()
    tokens = _TOKEN.finditer(lines[line - 1]) if line <= len(lines) else ()
    return next((token.group()[1:].strip() for token in tokens if token.group().startswith("#")), "")


def _keys(dotted: str) -> tuple[str, ...]:
    # tomli itself knows how keys are quoted and unescaped.
    keys: list[str] = []
    value: Any = tomli.loads(f"{dotted} = 0")
    while isinstance(value, dict):
        ((key, value),) = value.items()
        keys.append(key)
    return tuple(keys)


def _enter(keys: tuple[str, ...], arrays: dict[tuple[Part, ...], int], *, counted: bool) -> tuple[Part, ...]:
    """The path of a table header, with the index of each array of tables on the way."""
    path: tuple[Part, ...] = ()
    for position, key in enumerate(keys):
        path = (*path, key)
        if counted and position == len(keys) - 1:
            arrays[path] = arrays.get(path, -1) + 1
        if path in arrays:
            path = (*path, arrays[path])
    return path


def _after(line: str, depth: int, quotes: str) -> tuple[int, str]:
    """The bracket depth and the open multi-line quotes at the end of a line, from those at its start."""
    place = 0
    while place < len(line):
        if quotes:
            end = line.find(quotes, place)
            if end < 0:
                return depth, quotes
            place, quotes = end + len(quotes), ""
            continue
        match = _TOKEN.search(line, place)
        if match is None or match.group().startswith("#"):
            return depth, ""
        place, token = match.end(), match.group()
        if token in ('"""', "'''"):
            quotes = token
        elif len(token) == 1:
            depth += 1 if token in "[{" else -1
    return depth, quotes
