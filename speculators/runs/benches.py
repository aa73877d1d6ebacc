"""The benchmarks that a run folder holds: one more filed, all read for a report, a comparison and an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import FORMAT
from speculators.files.disk import disk_errors, read_json, write_json
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.lock import Lock, LockError
from speculators.runs.background import Background
from speculators.runs.stages import SPECULATOR, served_folder
from speculators.servers import result as served

Values = dict[str, Any]

# What readers of a setting, and of a file, rely on.
_SETTING = (
    "suite",
    "prompts_digest",
    "num_speculative_tokens",
    "temperature",
    "definition",
    "exact",
    "by_prompt",
    "live",
)
# What one setting is known by.
_KEY = ("suite", "prompts_digest", "temperature", "num_speculative_tokens")
_WHERE = ("speculator", "verifier", "device", "threads", "dtype", "seed", "max_new_tokens")

_SERVED_WHERE = ("engine", "version", "max_new_tokens")
_SERVED_SETTING = (
    "suite",
    "suite_digest",
    "prompt_ids",
    "num_speculative_tokens",
    "temperature",
    "definition",
    "acceptance",
    "by_prompt",
)


@attrs.frozen(kw_only=True)
class RunBenchmarks:
    """What was measured.

    Attributes:
        settings: of all files, each with the name of its `file` and the `dtype` that the verifier computed in. The same
            setting on the same prompts is there once, from the newest file.
        files: what each file was measured on, the oldest first.
        unread: files that cannot be read, in words.
    """

    settings: tuple[Values, ...]
    files: tuple[Values, ...]
    unread: tuple[str, ...]


def read_benches(folder: Path) -> RunBenchmarks:
    """Returns the benchmarks of a run."""
    settings: dict[tuple[Any, ...], Values] = {}
    unread: list[str] = []
    files = _whole(folder / "bench", FORMAT, _WHERE, _SETTING, unread)
    for name, held in files.items():
        for setting in held["settings"]:
            settings[tuple(setting[key] for key in _KEY)] = {**setting, "file": name, "dtype": held["dtype"]}
    told = tuple({"file": name, **{key: held[key] for key in _WHERE}} for name, held in files.items())
    return RunBenchmarks(settings=tuple(settings.values()), files=told, unread=tuple(unread))


def read_served(folder: Path) -> tuple[list[Values], list[str]]:
    """Returns the benchmarks of servers that a run holds, the oldest first, and in words what cannot be read."""
    unread: list[str] = []
    files = _whole(served_folder(folder), served.FORMAT, _SERVED_WHERE, _SERVED_SETTING, unread)
    return list(files.values()), unread


def _whole(
    folder: Path, kept: int, where: Sequence[str], setting: Sequence[str], unread: list[str]
) -> dict[str, Values]:
    """Returns the benchmarks in a folder by the names of their files, the oldest first; `unread` gets the others."""
    found = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name)):
        held = read_json(file)
        if why := _damage(held, kept, where, setting):
            unread.append(f"{folder.name}/{file.name} is left out: it is {why}; measuring again replaces it")
        else:
            found[file.name] = held
    return found


def _damage(held: Any, kept: int, where: Sequence[str], needed: Sequence[str]) -> str:
    """Returns why the content of a file is no benchmark, "" where it is one."""
    if not isinstance(held, dict):
        return "damaged"
    if held.get("format") != kept:
        return f"of format {held.get('format')}, this version reads {kept}"
    lacking = [key for key in (*where, "settings") if key not in held]
    settings = held.get("settings", [])
    if not isinstance(settings, list) or not all(isinstance(setting, dict) for setting in settings):
        return "damaged: its settings are no list of tables"
    lacking += dict.fromkeys(key for setting in settings for key in needed if key not in setting)
    return f"damaged: it lacks {', '.join(lacking)}" if lacking else ""


def file_bench(run: Path, result: Values) -> Path:
    """Keeps a benchmark that was asked for in a run's folder, in place of an earlier one of the same.

    Returns:
        The file: what the run's ledger, report, diff and exports tell from now on.
    """
    asked = [[setting[name] for name in _KEY] for setting in result["settings"]]
    same = fingerprint({"settings": asked, "dtype": result["dtype"], "tokens": result["max_new_tokens"]})
    file = run / "bench" / f"asked-{same[:8]}.json"
    with disk_errors(file):
        file.parent.mkdir(exist_ok=True)
    write_json(file, result)
    return file


def background_of(speculator: Path) -> Background:
    """Returns what the run that a speculator is in knows about it, nothing outside of one."""
    run = speculator.absolute().parent
    if speculator.absolute().name != SPECULATOR or not (run / "plan.json").is_file():
        return Background()
    benches, text = read_benches(run), run / "recipe.toml"
    lock, unread = None, list(benches.unread)
    try:
        lock = Lock.read(run)
    except LockError as error:
        unread.append(f"{error}: the lock is left out")
    return Background(
        run=run.name,
        settings=benches.settings,
        recipe=text.read_text(encoding="utf-8") if text.is_file() else None,
        lock=lock,
        unread=tuple(unread),
    )
