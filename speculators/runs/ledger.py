"""The ledger of a run: its predicted, measured and served acceptance lengths side by side, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.result import BenchResult, Setting, jsonable
from speculators.errors import ArtifactError
from speculators.events import EvalEvent
from speculators.recipe.plan import read_plan
from speculators.runs.benches import read_benches, read_served
from speculators.runs.ledger_entries import (
    LedgerEntry,
    TrainedTau,
    live_entry,
    predicted_entry,
    served_entry,
    trained_entry,
)
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder
from speculators.runs.stages import TAU_AT, TrainingRecord
from speculators.servers.result import ServedResult, ServedSetting


@attrs.frozen(kw_only=True)
class LedgerLine:
    """Every acceptance length known of one (suite, K, T)."""

    suite: str
    num_speculative_tokens: int
    temperature: float
    entries: tuple[LedgerEntry, ...]

    @property
    def place(self) -> str:
        """Suite, K and T for people."""
        return f"{self.suite}, K={self.num_speculative_tokens}, T={self.temperature:g}"

    @property
    def alarms(self) -> tuple[str, ...]:
        """One sentence for each gap."""
        return tuple(f"{self.place}: {entry.kind} ({entry.source}): {entry.gap}" for entry in self.entries if entry.gap)


@attrs.frozen(kw_only=True)
class Ledger:
    """The ledger of one run.

    Attributes:
        run: the name of its folder.
        doctor: the command that looks for causes.
        unread: why a file was left out, one line for each.
    """

    run: str
    lines: tuple[LedgerLine, ...]
    doctor: str
    unread: tuple[str, ...]

    @property
    def alarms(self) -> tuple[str, ...]:
        """The alarms of all lines."""
        return tuple(alarm for line in self.lines for alarm in line.alarms)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values."""
        return {
            "run": self.run,
            "lines": [jsonable(attrs.asdict(line)) for line in self.lines],
            "alarms": list(self.alarms),
            "doctor": self.doctor,
            "unread": list(self.unread),
            "agrees": not self.alarms,
        }


def read_ledger(run: Path) -> Ledger:
    """Reads the ledger of a run from the files in its folder.

    Raises:
        ArtifactError: the folder is not a run, or nothing was measured in it.
    """
    if not RunFolder(run).plan.is_file():
        raise ArtifactError(f"{run}: not a run: it has no plan.json", hint="spec ls lists the runs")
    plan, benches = read_plan(RunFolder(run).plan), read_benches(run)
    served, unread = read_served(run)
    lines = ledger_lines(list(benches.newest()), served, _trained_taus(run, plan["recipe"]["benchmark"]))
    if not lines:
        hint = "name a suite in the recipe's [benchmark] and spec run it, or spec bench RUN --suite NAME"
        raise ArtifactError(f"{run}: nothing was measured", hint=hint)
    return Ledger(
        run=run.name,
        lines=tuple(lines),
        doctor=f"spec doctor {RunFolder(run).speculator}",
        unread=(*benches.unread, *unread),
    )


def ledger_lines(
    benches: Sequence[BenchResult], served: Sequence[ServedResult], trained: Sequence[TrainedTau]
) -> list[LedgerLine]:
    """Puts the numbers of each (suite, K, T) side by side.

    Args:
        benches: in-process benchmarks, oldest first; the newest of a setting counts.
        served: benchmarks of servers, oldest first; the newest of a setting and engine counts.
        trained: training's own numbers; empty where no suite was evaluated.
    """
    predictions = {setting.key: (bench, setting) for bench in benches for setting in bench.settings}
    servers: dict[tuple[tuple[str, int, float], str, str], tuple[ServedResult, ServedSetting]] = {
        (setting.key, result.engine, result.version): (result, setting)
        for result in served
        for setting in result.settings
    }
    evaluations = {(each.suite, each.num_speculative_tokens, each.temperature): each for each in trained}
    lines = []
    for key in dict.fromkeys([*predictions, *(key for key, _, _ in servers), *evaluations]):
        bench: BenchResult | None
        setting: Setting | None
        bench, setting = predictions.get(key, (None, None))
        entries = [trained_entry(evaluations[key], setting)] if key in evaluations else []
        if bench is not None and setting is not None:
            entries.append(predicted_entry(bench, setting))
            entries += [live_entry(bench, setting, setting.live)] if setting.live else []
        entries += [served_entry(*pair, bench, setting) for (place, _, _), pair in servers.items() if place == key]
        suite, k, temperature = key
        line = LedgerLine(suite=suite, num_speculative_tokens=k, temperature=temperature, entries=tuple(entries))
        lines.append(line)
    return lines


def _trained_taus(run: Path, benchmark: dict[str, Any]) -> list[TrainedTau]:
    """Reads training's numbers for the exported checkpoint, on the first suite and temperature.

    The checkpoint was chosen by the number at the largest K; the same pass gave those at smaller K. Those that the
    recipe measures count.

    Args:
        benchmark: `[benchmark]` of the run's plan.
    """
    record = TrainingRecord.read(RunFolder(run))
    if record is None or record.tau is None or not benchmark["suites"]:
        return []
    ks = benchmark["num_speculative_tokens"]
    taus = {max(ks): record.tau}
    for event in RunLog.read(RunFolder(run).events).of(EvalEvent):
        if event.step == record.step:
            smaller = {name: tau for name, tau in event.metrics.items() if name.startswith(TAU_AT)}
            taus |= {int(name.removeprefix(TAU_AT)): tau for name, tau in smaller.items()}
    return [
        TrainedTau(
            suite=benchmark["suites"][0]["name"],
            num_speculative_tokens=k,
            temperature=benchmark["temperature"][0],
            tau=tau,
            step=record.step,
        )
        for k, tau in sorted(taus.items())
        if k in ks
    ]
