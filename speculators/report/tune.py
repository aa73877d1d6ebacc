"""The tables of `spec tune`, for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from speculators.formats.server_layout import PER_BATCH
from speculators.report.bench import number_text
from speculators.report.conclusion import unreliable
from speculators.report.recipe import plain_table
from speculators.servers.load import Spread
from speculators.tune.result import CandidateK, LoadPoint, ServedTuning, TuneResult
from speculators.tune.schedule import vllm_text

# Share of the draws that another K must lose, or it may be as good.
CLEAR = 0.95
# Above this noise, times mean little; an idle machine has a few per cent.
BUSY = 0.25


def tuning_table(result: TuneResult) -> RenderableType:
    """Renders every K with its prediction, and with its measurement where there is one."""
    table = plain_table("K", "tau", "draft ms", "verify ms", "cost", "predicted (95%)", "measured", "best")
    for each in result.candidates:
        table.add_row(*_cells(each))
    where = f"{result.suite}, {result.prompts} prompts, T={result.temperature:g}, {result.dtype} on {result.device}"
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    plain = (
        f"a plain step takes {1000 * result.plain_seconds:.2f} ms, and cost is in such steps; "
        f"noise: the middle half spans {100 * result.noise:.0f}% of the median; {result.cycles} rounds of each K"
    )
    notes = [Text(line, style="note") for line in (plain, result.definition)]
    unclear = [
        Text(f"K={each.num_speculative_tokens}: {unreliable(each.measured.speed_up)}", style="warn")
        for each in result.candidates
        if each.measured is not None and each.reliable is None
    ]
    if result.noise > BUSY:
        unclear.append(Text("the machine is busy, so its times mean little: tune again when it is idle", style="warn"))
    title = Text.assemble(("\ntuning ", "title"), (result.speculator, "name"))
    return Group(
        title, Text(where + threads, style="note"), table, *unclear, *notes, Text("\n" + _conclusion(result), "title")
    )


def _cells(each: CandidateK) -> tuple[str, ...]:
    low, high = each.predicted_interval
    return (
        str(each.num_speculative_tokens),
        number_text(each.tau, 3),
        f"{1000 * each.draft_seconds:.2f}",
        f"{1000 * each.verify_seconds:.2f}",
        f"{each.cost:.2f}",
        f"{number_text(each.predicted, 2)} ({number_text(low, 2)} to {number_text(high, 2)})",
        number_text(each.reliable, 2) if each.measured is None or each.reliable is not None else "?",
        f"{100 * each.chance_of_best:.0f}%",
    )


def _conclusion(result: TuneResult) -> str:
    best = result.best
    if best.reliable is None:
        pace = f"predicted {best.predicted:.2f}x, not measured"
    else:
        pace = f"measured {best.reliable:.2f}x, predicted {best.predicted:.2f}x"
    rivals = [
        f"{each.num_speculative_tokens} (best in {100 * each.chance_of_best:.0f}% of the draws)"
        for each in result.candidates
        if each is not best and each.chance_of_best > 1 - CLEAR
    ]
    doubt = f" K = {', '.join(rivals)} may be as good." if rivals else ""
    speed = best.predicted if best.reliable is None else best.reliable
    slower = " Drafting does not pay here." if speed < 1 else ""
    return f"K = {best.num_speculative_tokens}: {pace}.{slower}{doubt}"


def served_tuning_tables(result: ServedTuning) -> RenderableType:
    """Renders the measurements under each load, the best K of each, and the schedule in vLLM's form."""
    title = Text.assemble(("\ntuning ", "title"), (result.speculator, "name"), f" for {result.engine} {result.version}")
    where = f"{result.suite}, {len(result.points)} loads, T={result.temperature:g}"
    measured = plain_table("at once", "K", "in flight", "tokens/s", "step ms", "first token ms", "speed-up")
    for point in result.points:
        for row in _load_rows(point):
            measured.add_row(*row)
    chosen = plain_table("batch", "best K", "predicted")
    for each in result.choices:
        chosen.add_row(str(each.batch), str(each.num_speculative_tokens), f"{each.predicted:.2f}")
    taus = ", ".join(f"{tau:.3f} at K={k}" for k, tau in result.taus)
    note = f"tau by replay: {taus}; costs between measured loads and K are interpolated; step ms: mean of steps, rounds"
    return Group(
        title, Text(where, style="note"), measured, Text(), chosen, Text(note, style="note"), *_schedule(result)
    )


def _schedule(result: ServedTuning) -> list[RenderableType]:
    if not result.most:
        return [Text("\nDrafting does not pay under any load.", style="title")]
    off = "Drafting pays up to the largest load." if result.off_from is None else f"Off from batch {result.off_from}."
    lines: list[RenderableType] = [Text("\n" + off, style="title")]
    if result.engine == "vllm":
        lines.append(Text(f"--speculative-config with: {vllm_text(result.schedule)}"))
    else:
        ranges = ", ".join(f"{first}-{last}: K={k}" for first, last, k in result.schedule)
        lines.append(Text(f"{ranges} ({PER_BATCH} is an option of vLLM alone)"))
    return lines


def _load_rows(point: LoadPoint) -> list[tuple[str, ...]]:
    plain = point.plain
    rows = [(str(point.concurrency), "0", point.in_flight, plain, point.step_seconds, "")]
    for each in point.drafting:
        gain = f"{each.pace.tokens_per_second / plain.tokens_per_second:.2f}"
        rows.append(("", str(each.num_speculative_tokens), each.in_flight, each.pace, each.round_seconds, gain))
    return [
        (
            load,
            k,
            f"{in_flight:.1f}",
            f"{pace.tokens_per_second:.1f}",
            f"{1000 * seconds:.2f}",
            _milliseconds(pace.first_token),
            gain,
        )
        for load, k, in_flight, pace, seconds, gain in rows
    ]


def _milliseconds(spread: Spread | None) -> str:
    return "-" if spread is None else f"{1000 * spread.p50:.1f}"
