"""The benchmarks that a run folder holds: filing one more, and reading all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import attrs

from speculators.bench.result import FORMAT, BenchResult, Setting
from speculators.errors import Problem
from speculators.files.disk import disk_errors, read_json, write_json
from speculators.recipe.fingerprint import fingerprint
from speculators.runs.places import RunFolder
from speculators.servers import result as served
from speculators.servers.audit import AuditResult
from speculators.servers.result import ServedResult
from speculators.structure.converter import structure

Result = TypeVar("Result", BenchResult, ServedResult)
# Problems of one damaged file that are reported.
MOST_PROBLEMS = 3


@attrs.frozen(kw_only=True)
class FiledSetting:
    """The newest numbers of one setting.

    Attributes:
        result: the benchmark that they are from.
        file: its name.
    """

    setting: Setting
    result: BenchResult
    file: str


@attrs.frozen(kw_only=True)
class RunBenchmarks:
    """The in-process benchmarks of a run.

    Attributes:
        filed: each setting once, from the newest file that measured it on the same prompts.
        files: every benchmark by the name of its file, oldest first.
        unread: why a file was left out, one line for each.
    """

    filed: tuple[FiledSetting, ...]
    files: dict[str, BenchResult]
    unread: tuple[str, ...]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings, without where they were filed."""
        return tuple(each.setting for each in self.filed)

    def newest(self) -> Iterator[BenchResult]:
        """Yields the benchmarks, oldest first, without the settings that a newer one measured again."""
        for file, result in self.files.items():
            yield attrs.evolve(result, settings=tuple(each.setting for each in self.filed if each.file == file))


def read_benches(run: Path) -> RunBenchmarks:
    """Reads the in-process benchmarks of a run; a damaged file, or one of another format, is left out."""
    files, unread = _read(RunFolder(run).bench, BenchResult, FORMAT)
    filed = {
        (*setting.key, setting.prompts_digest): FiledSetting(setting=setting, result=result, file=file)
        for file, result in files.items()
        for setting in result.settings
    }
    return RunBenchmarks(filed=tuple(filed.values()), files=files, unread=tuple(unread))


def read_served(run: Path) -> tuple[list[ServedResult], list[str]]:
    """Reads the benchmarks of servers that a run holds, oldest first, and says why a file was left out."""
    files, unread = _read(RunFolder(run).served, ServedResult, served.FORMAT)
    return list(files.values()), unread


def file_bench(run: Path, result: BenchResult) -> Path:
    """Files a benchmark in a run's folder, replacing an earlier one of the same settings.

    Returns:
        The file, which the run's ledger, report, diff and exports read from now on.
    """
    settings = [
        [each.suite, each.prompts_digest, each.temperature, each.num_speculative_tokens] for each in result.settings
    ]
    same = fingerprint({"settings": settings, "dtype": result.dtype, "tokens": result.max_new_tokens})
    return _file(RunFolder(run).requested_benchmark(same), result.to_json())


def file_served(run: Path, result: ServedResult) -> Path:
    """Files a benchmark of a server in a run's folder, replacing an earlier one of the same; returns the file."""
    settings = [
        [each.suite, each.prompts_digest, each.num_speculative_tokens, each.temperature] for each in result.settings
    ]
    same = fingerprint({"settings": settings, "concurrency": result.concurrency, "tokens": result.max_new_tokens})
    return _file(RunFolder(run).served_benchmark(result.engine, _in_names(result.version), same), result.to_json())


def file_audit(run: Path, result: AuditResult) -> Path:
    """Files an audit of a server in a run's folder, replacing an earlier one of the same; returns the file."""
    same = fingerprint(
        {
            "prompts": list(result.prompts_digests),
            "k": result.num_speculative_tokens,
            "concurrency": result.concurrency,
            "tokens": result.max_new_tokens,
        }
    )
    return _file(RunFolder(run).audit(result.engine, _in_names(result.version), same), result.to_json())


def _in_names(version: str) -> str:
    return re.sub(r"[^\w.+-]", "_", version)


def _file(file: Path, document: dict[str, Any]) -> Path:
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)
    return file


def _read(folder: Path, cls: type[Result], format: int) -> tuple[dict[str, Result], list[str]]:
    """Reads the results in a folder by file name, oldest first, and says why a file was left out."""
    results: dict[str, Result] = {}
    unread: list[str] = []
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name)):
        document = read_json(file)
        if not isinstance(document, dict):
            reason = "damaged"
        elif document.get("format") != format:
            reason = f"of format {document.get('format')}, this version reads {format}"
        else:
            result: Result | None
            problems: list[Problem]
            result, problems = structure(document, cls)
            if result is not None:
                results[file.name] = result
                continue
            reason = "; ".join(["damaged", *(f"{each.path} {each.message}" for each in problems[:MOST_PROBLEMS])])
        unread.append(f"{folder.name}/{file.name} is left out: it is {reason}; measuring again replaces it")
    return results, unread
