"""Compares the runs of several algorithms in two Markdown tables: acceptance, and cost of training.

    python -m benchmarks.algorithms runs/quickstart-* runs/quickstart_*-*

The figures come from each run's own benchmarks and events; benchmarks/README.md defines them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from speculators.bench.result import Acceptance, Setting
from speculators.bench.speed import Speed
from speculators.events import StageEvent, StepEvent, TrainedFacts
from speculators.report.bench import number_text, rates_text
from speculators.report.gather import RunReport, gather_run
from speculators.runs.log import RunLog
from speculators.runs.places import RunFolder
from speculators.structure.validators import HYBRID

REACHED = "| algorithm | T | K | tau (95%) | accepted by position | live | draft + verify ms | speed-up |"
COSTS = "| algorithm | parameters trained | tokens/s in training | minutes of training |"


def settings_of(run: RunReport) -> list[Setting]:
    """Sorts a run's settings by suite, temperature and K."""
    return sorted(run.settings, key=lambda s: (s.suite, s.temperature, s.num_speculative_tokens))


def reached(name: str, run: RunReport) -> Iterator[tuple[tuple[str, float, int], str]]:
    """Yields ((drafts, T, K), table row) for each setting and for each baseline measured beside it.

    A hybrid is named with the speculator that is part of it.
    """
    for setting in settings_of(run):
        k, temperature, live = setting.num_speculative_tokens, setting.temperature, setting.live
        agrees = "not asked" if live is None else live.agreement.verdict.replace("disagrees", "**disagrees**")
        speed = None if live is None else live.speed
        yield (name, temperature, k), _row(name, temperature, k, setting.exact, agrees, speed)
        for each in setting.baselines:
            other = f"{each.name} + {name}" if each.name.startswith(f"{HYBRID}:") else each.name
            yield (other, temperature, k), _row(other, temperature, k, each.acceptance, "", each.speed)


def _row(name: str, temperature: float, k: int, acceptance: Acceptance, live: str, speed: Speed | None) -> str:
    low, high = acceptance.tau_interval
    tau = f"{number_text(acceptance.tau, 3)} ({number_text(low, 2)} to {number_text(high, 2)})"
    cost = f"{1e3 * speed.draft_seconds:.0f} + {1e3 * speed.verify_seconds:.0f}" if speed else ""
    gain = f"{speed.speed_up:.2f}" if speed else ""
    cells = (name, f"{temperature:g}", str(k), tau, rates_text(acceptance.by_position), live, cost, gain)
    return f"| {' | '.join(cells)} |"


def costs(name: str, folder: Path, run: RunReport) -> str:
    """Formats what a run's training took, as one row; the rate is the median over updates."""
    log = RunLog.read(RunFolder(folder).events)
    rates = [update.tokens_per_second for update in log.of(StepEvent)]
    seconds = next(stage.seconds for stage in run.stages if stage.name == "train")
    # Runs that predate facts have the count in a sentence only.
    trained = [event.facts.parameters for event in log.of(StageEvent) if isinstance(event.facts, TrainedFacts)]
    rate = f"{statistics.median(rates):,.0f}" if rates else "-"
    minutes = "-" if seconds is None else f"{seconds / 60:.1f}"
    return f"| {name} | {f'{trained[-1]:,}' if trained else '-'} | {rate} | {minutes} |"


def tables(folders: Sequence[Path]) -> str:
    """Formats both tables. A baseline appears once per setting, as the last run that includes it measured it."""
    runs = {folder: gather_run(folder, folder.name) for folder in folders}
    names = {folder: run.recipe["algorithm.name"] for folder, run in runs.items()}
    rows = dict(row for folder, run in runs.items() for row in reached(names[folder], run)).values()
    spent = [costs(names[folder], folder, run) for folder, run in runs.items()]
    return "\n".join([REACHED, _rule(REACHED), *rows, "", COSTS, _rule(COSTS), *spent])


def _rule(header: str) -> str:
    return "|" + "---|" * (header.count("|") - 1)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    print(tables(parser.parse_args().runs))


if __name__ == "__main__":
    main()
