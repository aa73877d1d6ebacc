"""What the cache holds, entry by entry: size, last use, and the recipes and models it serves; and removing entries."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.files.disk import disk_errors, folder_bytes, read_json
from speculators.files.folders import MANIFEST
from speculators.files.used import is_used, mark_file, unused, used_for
from speculators.runs.places import run_folders

# The folders of the cache and the names of their entries: nothing else is ever listed or removed.
KINDS = {
    "verifiers": re.compile(r"(tiny|gguf)-[0-9a-f]+-v\d+"),
    "conversations": re.compile(r"[0-9a-f]{16}"),
    "states": re.compile(r"[0-9a-f]{16}"),
    "regenerated": re.compile(r"[0-9a-f]{16}\.jsonl"),
    "served": re.compile(r"[0-9a-f]{16}"),
}
# Beside an entry: what is half made, and where answers come from.
BESIDE = (".partial", ".part", ".json")
# The stage of a plan whose fingerprint names the entries of a kind.
STAGES = {"conversations": "prepare", "regenerated": "prepare", "states": "capture"}
DAY_SECONDS = 86_400


@attrs.frozen(kw_only=True)
class CacheEntry:
    """One entry of the cache.

    Attributes:
        kind: one of `KINDS`.
        last_used: seconds since the epoch.
        users: names of the recipes and models that it was used for, as far as known.
        in_use: whether a process is using it now.
    """

    kind: str
    path: Path
    bytes: int
    last_used: float
    users: tuple[str, ...]
    in_use: bool

    @property
    def name(self) -> str:
        """Kind and name: what `spec cache prune` takes."""
        return f"{self.kind}/{self.path.name}"

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values."""
        return {"name": self.name, **attrs.asdict(self), "path": str(self.path)}


@attrs.frozen(kw_only=True)
class Choice:
    """Which entries to remove.

    Attributes:
        names: kinds, entries, recipes or models; () for all.
        unused_days: only those that nobody used for this many days.
    """

    names: tuple[str, ...] = ()
    unused_days: float = 0.0

    def takes(self, entry: CacheEntry, now: float) -> bool:
        """Whether an entry is chosen."""
        known = {entry.kind, entry.name, entry.path.name, *entry.users, *(user.split("/")[-1] for user in entry.users)}
        return (
            not self.names or bool(known & {*self.names})
        ) and now - entry.last_used >= self.unused_days * DAY_SECONDS


def cache_entries(cache: Path, runs: Path) -> list[CacheEntry]:
    """Lists the entries of the cache, by kind and largest first.

    Args:
        runs: folder of runs, whose plans say what an entry without marks was made for.
    """
    users = _users_by_plans(runs)
    entries = [_entry(kind, path, users) for kind in KINDS for path in _paths(cache, kind)]
    return sorted(entries, key=lambda entry: (list(KINDS).index(entry.kind), -entry.bytes))


def _paths(cache: Path, kind: str) -> Iterator[Path]:
    """Yields the entries of a kind, but nothing that lies outside of the cache, where a link may lead."""
    if not (cache / kind).resolve().is_relative_to(cache.resolve()):
        return
    names = {path.name for path in (cache / kind).glob("*")}
    bases = {next((name.removesuffix(end) for end in BESIDE if name.endswith(end)), name) for name in names}
    for name in sorted(bases):
        if KINDS[kind].fullmatch(name) and parts(cache / kind / name):
            yield cache / kind / name


def parts(entry: Path) -> list[Path]:
    """Lists the files and folders of an entry: itself and what lies beside it, without links."""
    places = (entry, *(entry.with_name(f"{entry.name}{end}") for end in BESIDE))
    return [place for place in places if place.exists() and not place.is_symlink()]


def _entry(kind: str, path: Path, users: Mapping[tuple[str, str], tuple[str, ...]]) -> CacheEntry:
    mark = mark_file(path)
    manifest = read_json(path / MANIFEST)
    source = manifest.get("source") if isinstance(manifest, dict) else None
    planned = users.get((kind, path.name.partition(".")[0]), ())
    known = (*used_for(path), *planned, *([str(source)] if isinstance(source, str) else []))
    return CacheEntry(
        kind=kind,
        path=path,
        bytes=sum(folder_bytes(part) for part in parts(path)),
        last_used=max(file.stat().st_mtime for file in (*parts(path), mark) if file.exists()),
        users=tuple(dict.fromkeys(known)),
        in_use=is_used(path),
    )


def _users_by_plans(runs: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Reads from the plans of runs which recipe and model each entry of the cache belongs to."""
    users: dict[tuple[str, str], tuple[str, ...]] = {}
    for run in run_folders(runs):
        plan = read_json(run.plan)
        try:
            prints = {stage["name"]: stage["fingerprint"][:16] for stage in plan["stages"]}
            names = (str(plan["recipe"]["name"]), str(plan["recipe"]["verifier"]["model"]))
        except (KeyError, TypeError):
            continue
        for kind, stage in STAGES.items():
            if stage in prints:
                users[kind, prints[stage]] = (*users.get((kind, prints[stage]), ()), *names)
    return users


@attrs.frozen(kw_only=True)
class Pruned:
    """What a pruning removed, or would remove.

    Attributes:
        in_use: chosen, but kept because a process uses them.
    """

    removed: tuple[CacheEntry, ...]
    in_use: tuple[CacheEntry, ...]


def chosen(entries: Sequence[CacheEntry], choice: Choice) -> Pruned:
    """Splits the chosen entries into those that can be removed and those in use."""
    now = time.time()
    taken = [entry for entry in entries if choice.takes(entry, now)]
    return Pruned(
        removed=tuple(entry for entry in taken if not entry.in_use),
        in_use=tuple(entry for entry in taken if entry.in_use),
    )


def remove(entries: Sequence[CacheEntry]) -> Pruned:
    """Removes entries, except those that a process has begun to use.

    Raises:
        ArtifactError: an entry cannot be removed.
    """
    removed: list[CacheEntry] = []
    in_use: list[CacheEntry] = []
    for entry in entries:
        with disk_errors(entry.path), unused(entry.path) as free:
            for part in parts(entry.path) if free else ():
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            # The mark stays: another process may be waiting for its lock, and must find it on the same file.
            (removed if free else in_use).append(entry)
    return Pruned(removed=tuple(removed), in_use=tuple(in_use))
