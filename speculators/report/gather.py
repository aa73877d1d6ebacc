"""Gathers what a report shows of run folders, as typed values; anything missing is listed and never an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import BenchResult, Setting, taus
from speculators.diff.comparison import Comparison
from speculators.diff.measured import compare_with_records
from speculators.diff.side import DiffSide
from speculators.errors import ArtifactError
from speculators.events import StageEvent, StepEvent
from speculators.files.disk import read_json
from speculators.recipe.expect import band_lines, compare_bands
from speculators.recipe.plan import read_plan
from speculators.recipe.schema import Expect
from speculators.recipe.values import flatten_tables
from speculators.report.curves import TrainingCurves, read_curves
from speculators.report.progress import stage_sentence
from speculators.report.seeds import labels
from speculators.runs.benches import read_benches
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder
from speculators.runs.records import flat
from speculators.runs.stages import TrainingRecord

_STATUS = {"none": "not begun", "start": "begun, not ended", "done": "done", "skip": "was done before"}
Table = Mapping[str, Any]


@attrs.frozen(kw_only=True)
class StageReport:
    """How far one stage came.

    Attributes:
        fingerprint: None where the plan is missing.
        seconds: None unless it is done.
        detail: the last line that it reported.
    """

    name: str
    fingerprint: str | None
    status: str
    seconds: float | None
    detail: str


@attrs.frozen(kw_only=True)
class RunReport:
    """One run.

    Attributes:
        name: the folder's name, or its path where two runs share the name.
        label: what distinguishes it from the other runs on the page, such as "seed=1"; the name of a single run.
        summary: the recipe's.
        state: how far training came.
        missing: one line for each missing part, with the reason.
        curves: of training.
        tau_setting: the setting that the curve of tau is of, or "".
        plan: values of the plan beyond recipe and stages, by dotted path.
        recipe: every value by its TOML path.
        recipe_text: the file.
        lock: values of the lock, by dotted path.
        settings: the newest numbers of each benchmark setting.
        benches: every benchmark by the name of its file.
        expect: one line for each band of `[expect]`.
    """

    name: str
    label: str
    summary: str
    state: str
    missing: tuple[str, ...]
    curves: TrainingCurves
    tau_setting: str
    stages: tuple[StageReport, ...]
    plan: Mapping[str, str]
    recipe: Mapping[str, Any]
    recipe_text: str
    lock: Mapping[str, str]
    settings: tuple[Setting, ...]
    benches: Mapping[str, BenchResult]
    expect: tuple[str, ...]


@attrs.frozen(kw_only=True)
class RunDiff:
    """Two runs compared, or why they cannot be.

    Attributes:
        a, b: the names that the report gives the runs.
        comparison: None where a run is damaged.
        error: the damage, or "".
    """

    a: str
    b: str
    comparison: Comparison | None
    error: str = ""


@attrs.frozen(kw_only=True)
class Report:
    """Everything on the page; each run after the first is compared with the first."""

    runs: tuple[RunReport, ...]
    diffs: tuple[RunDiff, ...]


def gather(folders: Sequence[Path]) -> Report:
    """Gathers the report of some runs.

    Args:
        folders: of the runs; a folder that is named twice counts once.

    Raises:
        ArtifactError: a folder is not a run.
    """
    for folder in folders:
        if not (RunFolder(folder).plan.is_file() or RunFolder(folder).events.is_file()):
            fault = "not a run: it has neither plan.json nor events.jsonl" if folder.is_dir() else "no such folder"
            raise ArtifactError(f"{folder}: {fault}", hint="spec ls lists the runs")
    names = _names(folders)
    first, *others = names
    runs = [gather_run(folder, name) for folder, name in names.items()]
    short = labels([run.name for run in runs], [run.recipe for run in runs])
    return Report(
        runs=tuple(attrs.evolve(run, label=label) for run, label in zip(runs, short, strict=True)),
        diffs=tuple(_diff(first, other, names[first], names[other]) for other in others),
    )


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Names each run once: by its folder's name, or by its path where another run has the same name."""
    runs = {folder.resolve(): str(folder) for folder in folders}
    names = [folder.name for folder in runs]
    return {folder: folder.name if names.count(folder.name) == 1 else path for folder, path in runs.items()}


def gather_run(folder: Path, name: str) -> RunReport:
    """Gathers one run."""
    run = RunFolder(folder)
    lock, trained = _read_table(run.lock), TrainingRecord.read(run)
    plan = _read_plan(folder)
    recipe = plan["recipe"] if plan else None
    log, no_events = _read_log(run.events)
    benches = read_benches(folder)
    state, unfinished = _state(trained, log, no_events)
    text = run.recipe
    return RunReport(
        name=name,
        label=name,
        summary=recipe["summary"] if recipe else "",
        state=state,
        missing=(
            *([] if recipe else ["plan.json is missing or damaged: plan, recipe and differences cannot be shown"]),
            *([] if lock else ["lock.json is missing or damaged: where this ran is not known"]),
            *([no_events] if no_events else []),
            *unfinished,
            *_missing_numbers(recipe, benches.settings, is_trained=trained is not None),
            *benches.unread,
        ),
        curves=read_curves(log),
        tau_setting=_tau_setting(recipe),
        stages=_stages(plan, log),
        plan=_derived(plan) if plan else {},
        recipe=flatten_tables(recipe) if recipe else {},
        recipe_text=text.read_text(encoding="utf-8", errors="replace") if text.is_file() else "",
        lock=_lock_values(lock or {}),
        settings=benches.settings,
        benches=benches.files,
        expect=tuple(_expect(recipe, benches.settings)),
    )


def _lock_values(lock: Table) -> dict[str, str]:
    """Picks the values of a lock that people read; its recipe and the stages' inputs are shown elsewhere."""
    verifier = lock.get("verifier")
    files = verifier.get("files") if isinstance(verifier, dict) else None
    shown = {key: value for key, value in lock.items() if key not in ("recipe", "inputs", "verifier", "resumed_in")}
    return flat(shown | ({"verifier": files} if isinstance(files, dict) else {}))


def _read_table(file: Path) -> Table | None:
    value = read_json(file)
    return value if isinstance(value, dict) else None


def _read_plan(folder: Path) -> Table | None:
    try:
        return read_plan(RunFolder(folder).plan)
    except ArtifactError:
        return None


def _read_log(file: Path) -> tuple[RunLog, str]:
    """Reads the events of a run, and says why there are none."""
    try:
        log = RunLog.read(file)
    except ArtifactError as error:
        return RunLog(), f"{error}: there are no curves and no times"
    return log, "" if log.events else "events.jsonl is missing or empty: there are no curves and no times"


def _state(trained: TrainingRecord | None, log: RunLog, no_events: str) -> tuple[str, list[str]]:
    """Says how far training came, and what to do if it is not at its end."""
    if trained is not None:
        best = "" if trained.tau is None else f"; tau there {trained.tau:.3f}"
        return f"trained, {trained.total_steps} updates; exported from update {trained.step}{best}", []
    steps = log.of(StepEvent)
    if not steps:
        return ("not known", []) if "damaged" in no_events else ("not trained", ["training has not begun"])
    stop = f"training stopped after update {steps[-1].step} of {steps[-1].total_steps}"
    return stop, [f"{stop}: spec run with its recipe resumes from the last checkpoint"]


def _missing_numbers(recipe: Table | None, settings: Sequence[Setting], *, is_trained: bool) -> list[str]:
    if settings:
        ks = sorted({setting.num_speculative_tokens for setting in settings if setting.live is None})
        return [f"no live decode, and so no speed-up, at K={', '.join(map(str, ks))}"] if ks else []
    if recipe and not recipe["benchmark"]["suites"]:
        return ["the recipe names no suite: acceptance was not measured (spec bench RUN --suite NAME)"]
    return ["there is no benchmark" + (": spec run with its recipe continues with it" if is_trained else "")]


def _tau_setting(recipe: Table | None) -> str:
    """Names the setting that evaluations during training measure."""
    if not recipe or not recipe["benchmark"]["suites"]:
        return ""
    bench = recipe["benchmark"]
    k, temperature = max(bench["num_speculative_tokens"]), bench["temperature"][0]
    return f"{bench['suites'][0]['name']}, K={k}, T={temperature:g}"


def _stages(plan: Table | None, log: RunLog) -> tuple[StageReport, ...]:
    # The last event of each stage, except that a stage which a later launch skipped keeps its time.
    last: dict[str, StageEvent | None] = {}
    for event in log.of(StageEvent):
        if event.status != "skip" or event.stage not in last:
            last[event.stage] = event
    seconds = log.stage_seconds()
    fingerprints = {stage["name"]: stage["fingerprint"] for stage in plan["stages"]} if plan else {}
    return tuple(
        StageReport(
            name=name,
            fingerprint=fingerprints.get(name),
            status=_STATUS["none" if event is None else event.status],
            seconds=seconds.get(name) if event is not None and event.status == "done" else None,
            detail="" if event is None else stage_sentence(event),
        )
        for name, event in (dict.fromkeys(fingerprints) | last).items()
    )


def _derived(plan: Table) -> dict[str, str]:
    """Picks the values of the plan beyond the recipe and the stages."""
    return flat({key: value for key, value in plan.items() if key not in ("recipe", "stages", "run_name", "origins")})


def _expect(recipe: Table | None, settings: Sequence[Setting]) -> list[str]:
    bands: Mapping[str, Table] = recipe["expect"] if recipe else {}
    expect = {name: Expect(tau=tuple(band["tau"]), source=band["source"]) for name, band in bands.items()}
    return band_lines(compare_bands(expect, taus(settings)))


def _diff(a: Path, b: Path, a_name: str, b_name: str) -> RunDiff:
    try:
        sides = DiffSide.of_run(a_name, a), DiffSide.of_run(b_name, b)
        return RunDiff(a=a_name, b=b_name, comparison=compare_with_records(*sides, a.parent))
    except ArtifactError as error:
        return RunDiff(a=a_name, b=b_name, comparison=None, error=str(error))
