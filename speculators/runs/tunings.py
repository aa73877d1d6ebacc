"""Keeps the choices of K by `spec tune` in a run folder, and collects the acceptance lengths that it predicts from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import attrs

from speculators.files.disk import read_json, write_json
from speculators.runs.benches import read_benches
from speculators.runs.places import RunFolder
from speculators.structure.converter import structure
from speculators.tune.result import FORMAT, ServedTuning, TuneResult

Tuned = TypeVar("Tuned", TuneResult, ServedTuning)


@attrs.frozen(kw_only=True)
class RunTuning:
    """The choices of K that a run folder holds.

    Attributes:
        in_process: None where the run was not tuned in process.
        served: None where no servers were measured.
        unread: a line for each file that was left out, with the reason.
    """

    in_process: TuneResult | None = None
    served: ServedTuning | None = None
    unread: tuple[str, ...] = ()


def read_tuning(run: Path) -> RunTuning:
    """Reads the choices of a run; a damaged file, or one of another format, is left out."""
    folder = RunFolder(run)
    unread: list[str] = []
    return RunTuning(
        in_process=_read(folder.tuned, TuneResult, unread),
        served=_read(folder.tuned_for_servers, ServedTuning, unread),
        unread=tuple(unread),
    )


def file_tuning(run: Path, result: TuneResult | ServedTuning) -> Path:
    """Writes a choice to a run's folder in place of an earlier one of its kind; returns the file."""
    folder = RunFolder(run)
    file = folder.tuned if isinstance(result, TuneResult) else folder.tuned_for_servers
    write_json(file, result.to_json())
    return file


def known_taus(run: Path, suite: str, temperature: float) -> dict[int, float]:
    """Collects the exact acceptance lengths of a run by K, from its benchmarks and its tuning in process."""
    taus = {
        each.num_speculative_tokens: each.exact.tau
        for each in read_benches(run).settings
        if (each.suite, each.temperature) == (suite, temperature)
    }
    tuned = read_tuning(run).in_process
    if tuned is not None and (tuned.suite, tuned.temperature) == (suite, temperature):
        taus |= {each.num_speculative_tokens: each.tau for each in tuned.candidates}
    return taus


def _read(file: Path, cls: type[Tuned], unread: list[str]) -> Tuned | None:
    if not file.is_file():
        return None
    document = read_json(file)
    if isinstance(document, dict) and document.get("format") == FORMAT:
        result, _ = structure(document, cls)
        if result is not None:
            return result
    unread.append(f"{file.name} is left out: it is damaged or of another version; spec tune replaces it")
    return None
