"""Shows what one GPU must show, in ten minutes: correct kernels, equal bits, real recipes' steps, whole runs.

    python -m benchmarks.gpu.check [--only PART ..] [--json FILE] [--minutes 10]
    python -m benchmarks.gpu.check --small          # tiny shapes, on any machine: tries this program, not the GPU

Each part runs in a process of its own with a time limit of its own, so that neither a crash nor a hang of one stops the
others. The table has a line for each case; the exit code is 1 if a part failed. benchmarks/README.md describes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attrs
from rich.table import Table

from benchmarks.gpu.command import Ended, run
from benchmarks.gpu.lines import FAILED, PASSED, SKIPPED, VerdictLine
from benchmarks.perf.side_by_side import MARK
from speculators.files.disk import write_whole
from speculators.report.console import console
from speculators.report.recipe import plain_table

STYLE = {PASSED: "good", FAILED: "bad", SKIPPED: "warn"}
# Tiny shapes on a busy CPU are slower to start than real ones on a GPU.
SMALL_PATIENCE = 5
# A part that gets less than this share of its time is not begun.
LEAST_SHARE = 0.5


@attrs.frozen(kw_only=True)
class GpuPart:
    """One part of the check.

    Attributes:
        name: of its module in this folder, too.
        shows: what it shows, for --help.
        seconds: its time limit.
    """

    name: str
    shows: str
    seconds: float


PARTS = (
    GpuPart(name="device", shows="the GPU, torch, CUDA, transformers", seconds=40),
    GpuPart(name="kernels", shows="attention and head loss against wider references, at real shapes", seconds=90),
    GpuPart(name="bits", shows="gradients of each algorithm repeat to the bit", seconds=60),
    GpuPart(name="suites", shows="tests/nn, tests/losses, tests/models with CUDA as the default device", seconds=90),
    GpuPart(name="smoke", shows="`spec run smoke` with each algorithm, reduced and whole vocabulary", seconds=120),
    GpuPart(name="step", shows="one update of three recipes at their real shapes", seconds=90),
    GpuPart(name="sigterm", shows="a run that SIGTERM stopped resumes to the same bits", seconds=60),
    GpuPart(name="fsdp", shows="FSDP2 with NCCL in a world of one, through torchrun", seconds=45),
    GpuPart(name="capture", shows="tokens/s of capturing an 8B verifier's states, padded and packed", seconds=120),
    GpuPart(name="online", shows="`spec run` trains online for a random 8B verifier, six updates", seconds=120),
    GpuPart(name="decode", shows="milliseconds of drafting and verifying with that verifier; needs online", seconds=60),
)


@attrs.frozen(kw_only=True)
class PartOutcome:
    """How one part ended.

    Attributes:
        verdict: "failed" if a line failed or the part did not end well, "skipped" if no line passed.
        reason: why the part as a whole failed or was skipped.
        seconds: that it took, start of its process included.
    """

    name: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    lines: tuple[VerdictLine, ...] = ()

    @classmethod
    def of(cls, name: str, ended: Ended, seconds: float, limit: float) -> PartOutcome:
        """Reads the lines that a part printed; those before a crash or a time limit count, too."""
        texts = [line.removeprefix(MARK) for line in ended.out.splitlines() if line.startswith(MARK)]
        lines = tuple(VerdictLine(**json.loads(text)) for text in texts)
        verdicts = {line.verdict for line in lines}
        reason = ""
        if ended.code is None:
            reason = f"ended at its time limit of {limit:.0f} s"
        elif ended.code != 0:
            reason = f"its process ended with {ended.code}: {ended.tail}"
        elif not lines:
            reason = "it reported nothing"
        verdict = FAILED if reason or FAILED in verdicts else PASSED if PASSED in verdicts else SKIPPED
        return cls(name=name, verdict=verdict, reason=reason, seconds=round(seconds, 1), lines=lines)


def outcomes(parts: Sequence[GpuPart], options: argparse.Namespace, folder: Path) -> Iterator[PartOutcome]:
    """Runs the parts one after the other, as far as the time goes."""
    deadline = time.monotonic() + 60 * options.minutes
    for part in parts:
        began = time.monotonic()
        usual = part.seconds * (SMALL_PATIENCE if options.small else 1)
        limit = min(usual, deadline - began)
        if limit < LEAST_SHARE * usual:
            left = f"{max(0.0, limit):.0f} s of --minutes {options.minutes:g} are left"
            reason = f"it may take {usual:.0f} s, and {left}"
            yield PartOutcome(name=part.name, verdict=SKIPPED, reason=reason)
            continue
        console(stderr=True).print(f"{part.name}: {part.shows}", style="note")
        arguments = [part.name, folder, "--until", time.monotonic() + limit, *(["--small"] if options.small else [])]
        ended = run("benchmarks.gpu.part", *arguments, seconds=limit, folder=folder / "logs", leader=True)
        yield PartOutcome.of(part.name, ended, time.monotonic() - began, limit)


def table(results: Sequence[PartOutcome]) -> Table:
    """Renders a line for each part and, below it, one for each of its cases."""
    rows = plain_table("part", "verdict", "seconds", "figures")
    for part in results:
        rows.add_row(f"[title]{part.name}[/]", _styled(part.verdict), f"{part.seconds:.1f}", _plain(part.reason))
        for line in part.lines:
            texts = [line.reason, *(f"{name} {_number(value)}" for name, value in line.figures.items())]
            rows.add_row(f"  {_plain(line.name)}", _styled(line.verdict), "", _plain("; ".join(filter(None, texts))))
    return rows


def _styled(verdict: str) -> str:
    return f"[{STYLE[verdict]}]{verdict}[/]"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def document(results: Sequence[PartOutcome], options: argparse.Namespace) -> dict[str, Any]:
    """Makes the JSON document of the results so far."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "small": options.small,
        "minutes": options.minutes,
        "failed": [part.name for part in results if part.verdict == FAILED],
        "parts": [attrs.asdict(part) for part in results],
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    shows = "\n".join(f"  {part.name:9} {part.shows}" for part in PARTS)
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"parts:\n{shows}", formatter_class=kind)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help="these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each part")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together (default: 10)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too: tries this program")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave what is made")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a part failed."""
    options = parsed(argv)
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_")) if options.keep is None else options.keep.absolute()
    results: list[PartOutcome] = []
    try:
        chosen = [part for part in PARTS if options.only is None or part.name in options.only]
        for outcome in outcomes(chosen, options, folder):
            results.append(outcome)
            if options.json is not None:
                write_whole(options.json, (json.dumps(document(results, options), indent=1) + "\n").encode())
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    console().print(table(results), crop=False)
    return int(any(part.verdict == FAILED for part in results))


if __name__ == "__main__":
    raise SystemExit(main())
