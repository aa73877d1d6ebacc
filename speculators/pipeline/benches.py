"""The benchmarks that a run folder holds, read for a report and for a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import FORMAT
from speculators.pipeline.context import read_json

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
_WHERE = ("speculator", "verifier", "device", "threads", "dtype", "seed", "max_new_tokens")


@attrs.frozen(kw_only=True)
class Benches:
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


def read_benches(folder: Path) -> Benches:
    """Returns the benchmarks of a run."""
    settings: dict[tuple[Any, ...], Values] = {}
    files, unread = [], []
    for file in sorted((folder / "bench").glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name)):
        held = read_json(file)
        if why := _damage(held):
            unread.append(f"bench/{file.name} is left out: it is {why}; spec run of its recipe measures again")
            continue
        files.append({"file": file.name, **{key: held[key] for key in _WHERE}})
        for setting in held["settings"]:
            key = ("suite", "prompts_digest", "temperature", "num_speculative_tokens")
            settings[tuple(setting[name] for name in key)] = {**setting, "file": file.name, "dtype": held["dtype"]}
    return Benches(settings=tuple(settings.values()), files=tuple(files), unread=tuple(unread))


def _damage(held: Any) -> str:
    """Returns why the content of a file is no benchmark, "" where it is one."""
    if not isinstance(held, dict):
        return "damaged"
    if held.get("format") != FORMAT:
        return f"of format {held.get('format')}, this version reads {FORMAT}"
    lacking = [key for key in (*_WHERE, "settings") if key not in held]
    settings = held.get("settings", [])
    if not isinstance(settings, list) or not all(isinstance(setting, dict) for setting in settings):
        return "damaged: its settings are no list of tables"
    lacking += dict.fromkeys(key for setting in settings for key in _SETTING if key not in setting)
    return f"damaged: it lacks {', '.join(lacking)}" if lacking else ""
