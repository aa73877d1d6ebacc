"""Finds the files of a local source: one file, all of a folder, or those that match a pattern."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from speculators.errors import DataError

PLAIN_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (
    *PLAIN_SUFFIXES,
    *(f"{suffix}{packed}" for suffix in PLAIN_SUFFIXES for packed in (".gz", ".zst")),
    *(".parquet", ".arrow"),
)
# They probably hold rows that this package cannot read, so leaving them out of a folder must not go unnoticed.
_OTHER_DATA = (
    *(".csv", ".tsv", ".xlsx", ".avro", ".orc", ".pkl", ".pickle"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z"),
)
# Written beside the rows by the library `datasets`.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The words by which a data set hub tells splits apart in the names of files and folders.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
TRAIN = "train"


@attrs.frozen
class SourceFile:
    """One file of a source.

    Attributes:
        name: relative to the folder that the source names, with `/` between folders.
        split: the split that its name in a folder states; None if it states none.
        otherwise: the split of rows that have no field `split`; None: no split.
    """

    path: Path
    name: str
    split: str | None = None
    otherwise: str | None = None

    @property
    def stem(self) -> str:
        """The name without the suffix of its format."""
        suffix = max((each for each in SUFFIXES if self.name.endswith(each)), key=len, default=Path(self.name).suffix)
        return self.name.removesuffix(suffix)


def is_pattern(text: str) -> bool:
    """Whether a path names several files by `*`, `?` or `[...]`."""
    return any(sign in text for sign in "*?[")


def locate_files(path: Path, split: str | None) -> tuple[SourceFile, ...]:
    """Lists the files of a source in the order in which they are read, which is that of their names.

    Args:
        path: a file, a folder (all files below it whose suffix is one of `SUFFIXES`) or a pattern.
        split: of a folder, only the files of this split.

    Raises:
        DataError: there is nothing, or nothing readable; a folder has several splits, and `split` names none of them.
    """
    try:
        if path.is_file():
            return (SourceFile(path, path.name),)
        if path.is_dir():
            return _of_split(path, _readable(path), split)
        if is_pattern(str(path)):
            return _matches(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    raise DataError(f"{path}: no such file or folder", hint="relative paths start from the recipe's folder")


def is_whole_file(path: Path) -> bool:
    """Whether a source's path names one file: then its content alone identifies it, whatever its name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _matches(pattern: Path) -> tuple[SourceFile, ...]:
    fixed = Path(*_before_signs(pattern.parts))
    matches = {match.relative_to(fixed): match for match in fixed.glob(str(pattern.relative_to(fixed)))}
    names = {name.as_posix(): match for name, match in matches.items() if match.is_file() and not _is_hidden(name)}
    if not names:
        what = "only folders match: the pattern must match files, such as *.jsonl" if matches else "no file matches"
        raise DataError(f"{pattern}: {what}", hint="relative paths start from the recipe's folder")
    return tuple(SourceFile(names[name], _utf8(pattern, name)) for name in sorted(names))


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _before_signs(parts: Sequence[str]) -> Iterator[str]:
    for part in parts[:-1]:
        if is_pattern(part):
            return
        yield part


def _readable(folder: Path) -> list[str]:
    """Lists the names of the files of a folder that can be read, sorted; refuses other files with data in them."""
    names, others = [], []
    for name in _visible(folder):
        if name.endswith(SUFFIXES) and not _is_metadata(folder, name):
            names.append(_utf8(folder, name))
        elif name.endswith(_OTHER_DATA):
            others.append(name)
    if others:
        some = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        hint = f"extract or convert them, or give a pattern that leaves them out: {folder}/*.jsonl"
        raise DataError(f"{folder}: {some} cannot be read: rows come from {', '.join(SUFFIXES)}", hint=hint)
    if not names:
        raise DataError(f"{folder}: has no file with rows: {', '.join(SUFFIXES)}")
    return sorted(names)


def _visible(folder: Path) -> Iterator[str]:
    """Yields the names of all files below a folder, except those that are hidden or in hidden folders."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        yield from ((inside / name).as_posix() for name in files if not name.startswith("."))


def _is_metadata(folder: Path, name: str) -> bool:
    if name.rpartition("/")[2] in _METADATA:
        return True
    # Regenerated answers have their provenance beside them: answers.jsonl.json.
    stem, suffix, _ = name.rpartition(".json")
    return suffix != "" and stem.endswith(SUFFIXES) and (folder / stem).is_file()


def _utf8(place: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: the name of a file is not UTF-8: {name!r}", hint="rename it") from None
    return name


def _of_split(folder: Path, names: Sequence[str], split: str | None) -> tuple[SourceFile, ...]:
    """Keeps the files of a split. In a folder where some names state a split, the others belong to "train"."""
    stated = {name: _stated_split(name) for name in names}
    splits = sorted({label or TRAIN for label in stated.values()})
    if split is None:
        if len(splits) > 1:
            first = TRAIN if TRAIN in splits else splits[0]
            hint = f'say which: split = "{first}"; or give a pattern such as {folder}/*.jsonl'
            raise DataError(f"{folder}: its files are of the splits {', '.join(splits)}", hint=hint)
    elif all(stated.values()) and split not in splits:
        raise DataError(f"{folder}: no file is of split {split!r}; available: {', '.join(splits)}")
    kept = [name for name in names if split is None or stated[name] in (None, split)]
    return tuple(SourceFile(folder / name, name, stated[name], TRAIN) for name in kept)


def _stated_split(name: str) -> str | None:
    """Reads the split off the name of a file in a folder: "train-00000-of-00002.parquet", "test/rows.jsonl"."""
    *folders, file = name.split("/")
    stem = file.partition(".")[0]
    shard = _SHARD.fullmatch(stem)
    if shard and _terms(shard[1])[0] in _SPLITS:
        return _SPLITS.get(shard[1], shard[1])  # "train_sft" is a split of its own
    for part in (stem, *reversed(folders)):
        if stated := next((term for term in _terms(part) if term in _SPLITS), None):
            return _SPLITS[stated]
    return None


def _terms(text: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", text.lower())
