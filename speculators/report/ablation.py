"""An ablation's table for the terminal and as Markdown, its plot, and what it would do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from speculators.ablation.forecast import Forecast
from speculators.ablation.result import AblationResult, ArmResult
from speculators.ablation.runs import FailedRun, RunBegins, RunEnds
from speculators.ablation.statistics import TauDifference
from speculators.report.plots import Series, dots, image
from speculators.report.progress import duration
from speculators.report.recipe import plain_table

HOLDS = "*"
COLUMNS = ("variant", "tau", "difference (95%)", "1st draft", "minutes")


def ablation_table(result: AblationResult) -> RenderableType:
    """Renders the table with its title, what it means, and the runs that failed."""
    table = plain_table(*COLUMNS)
    for column in table.columns[1:]:
        column.no_wrap = True
    for arm in result.arms:
        table.add_row(*(escape(cell) for cell in _cells(arm)))
    title = Text.assemble((f"ablation {result.name}", "title"), f"  {_measured(result)}")
    parts: list[RenderableType] = [title, table, Text()]
    parts += [Text(line, style="note") for line in _notes(result)]
    parts += [Text(line, style="bad") for line in _failures(result)]
    return Group(*parts)


def ablation_markdown(result: AblationResult) -> str:
    """Writes the table as Markdown, with what it means."""
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *(_cells(arm) for arm in result.arms)]
    lines = [f"Ablation {result.name}: {_measured(result)}", ""]
    lines += [f"| {' | '.join(cell.replace(HOLDS, chr(92) + HOLDS) for cell in row)} |" for row in rows]
    options = [f"* {name}: `{'`, `'.join(each)}`" for name, each in _options(result)]
    notes = [f"{line.replace(HOLDS, chr(92) + HOLDS)}  " for line in (*_notes(result), *_failures(result))]
    return "\n".join([*lines, "", *notes, "", *options]) + "\n"


def ablation_plot(result: AblationResult) -> str:
    """Draws the differences with their intervals as an SVG file; "" where there is none to draw."""
    shown = [(arm.name, arm.difference) for arm in result.arms if arm.difference]
    if not shown:
        return ""
    names, differences = zip(*shown, strict=True)
    series = Series(
        name="difference",
        x=range(len(shown)),
        y=[each.mean for each in differences],
        intervals=[(each.low, each.high) for each in differences],
    )
    count = len(result.seeds)
    axis = f"tau minus the base's, 95%\n{result.setting}, {count} {'seed' if count == 1 else 'seeds'}"
    return image(dots(f"ablation {result.name}", names, [series], x=axis, level=0.0))


def event_text(event: RunBegins | RunEnds, name: str) -> Text | None:
    """Announces a run of the ablation `name`, or says that it failed; None for one that ended well."""
    run = f"{event.run.arm}, seed {event.run.seed}"
    if isinstance(event, RunBegins):
        return Text(f"ablation {name}: run {event.number} of {event.total}: {run}", style="title")
    return Text(f"{run} failed: {event.outcome.message}", style="bad") if isinstance(event.outcome, FailedRun) else None


def difference_text(each: TauDifference) -> str:
    """Writes a difference as "+0.031 (+0.012 to +0.050)"."""
    return f"{each.mean:+.3f} ({each.low:+.3f} to {each.high:+.3f})"


def forecast_tables(plan: Forecast) -> RenderableType:
    """Renders the runs, the stages that they share, and the time that is left."""
    runs = plain_table("variant", "seed", "run", "trained", "measured")
    for run in plan.runs:
        marks = [_yes(run.stages[stage]) for stage in ("train", "bench")]
        runs.add_row(escape(run.arm), str(run.seed), escape(run.run), *marks)
    parts: list[RenderableType] = [
        Text.assemble(
            (f"ablation {plan.name}", "title"), f"  {plan.setting}; {len(plan.runs)} runs, {plan.left} to do"
        ),
        runs,
    ]
    if plan.shared:
        shared = plain_table("made once", "fingerprint", "on disk", "read by")
        for stage in plan.shared:
            readers = _readers(stage.arms, [run.arm for run in plan.runs if not run.is_done])
            shared.add_row(stage.stage, stage.fingerprint[:16], _yes(stage.is_done), escape(readers))
        parts += [Text(), shared]
    time = "unknown" if plan.seconds is None else f"about {duration(plan.seconds)}"
    return Group(*parts, Text(), Text(f"time left: {time} ({plan.basis})" if plan.left else "nothing is left to do"))


def _readers(arms: Sequence[str], pending: Sequence[str]) -> str:
    """Lists arms, by those that are missing where these are fewer."""
    others = [name for name in dict.fromkeys(pending) if name not in arms]
    if len(others) >= len(arms):
        return ", ".join(arms)
    return f"all but {', '.join(others)}" if others else "all"


def _yes(done: bool) -> str:
    return "yes" if done else "no"


def _cells(arm: ArmResult) -> tuple[str, ...]:
    tau, first, minutes = (arm.mean(value) for value in ("tau", "first", "training_minutes"))
    return (
        arm.name,
        _number(tau, ".3f"),
        f"{difference_text(arm.difference)}{HOLDS if arm.holds else ''}" if arm.difference else _without(arm, tau),
        _number(first, ".2f"),
        _number(minutes, ".1f"),
    )


def _options(result: AblationResult) -> Iterator[tuple[str, Sequence[str]]]:
    """Lists what each arm changes in the recipe."""
    yield "recipe", (result.recipe,)
    if result.options:
        yield "all", result.options
    yield from ((arm.name, arm.options) for arm in result.arms[1:])


def _without(arm: ArmResult, tau: float | None) -> str:
    """What stands for a difference that there is not."""
    return "failed" if arm.failures and tau is None else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def _measured(result: AblationResult) -> str:
    return f"{result.setting}, {result.prompts} prompts, {_seeds(result)}"


def _seeds(result: AblationResult) -> str:
    names = ", ".join(map(str, result.seeds))
    return f"{len(result.seeds)} seeds ({names})" if len(result.seeds) > 1 else f"1 seed ({names})"


def _notes(result: AblationResult) -> Iterator[str]:
    """Says what the numbers mean and what they rest on."""
    yield result.definition
    yield "1st draft: share of rounds that accept it; minutes: of training; means over seeds"
    judged = sum(arm.holds is not None for arm in result.arms)
    if result.over_seeds:
        yield (
            "difference: from the base, paired by prompt and seed; intervals over prompts and seeds; from seed to "
            f"seed a run's tau moves by {result.seed_deviation:.3f} (standard deviation)"
        )
        if judged:
            together = f" over all {judged} variants together (Holm)" if judged > 1 else ""
            yield f"{HOLDS} differs from the base at 5%{together}"
    else:
        yield (
            "difference: from the base, paired by prompt; intervals over prompts only: too few runs to see how far "
            "tau moves from seed to seed, so no difference is marked"
        )
    counts = {arm.name: arm.difference.seeds for arm in result.arms if arm.difference}
    if fewer := [f"{name} ({count})" for name, count in counts.items() if count < len(result.seeds)]:
        yield f"compared over fewer seeds: {', '.join(fewer)}"
    if result.unfinished:
        yield f"{result.unfinished} runs have not ended"


def _failures(result: AblationResult) -> Sequence[str]:
    lines = [
        f"{arm.name}, seed {seed} failed: {message}" for arm in result.arms for seed, message in arm.failures.items()
    ]
    doubtful = [each for arm in result.arms for each in arm.seeds if not each.agrees]
    return [*lines, *(f"{each.run}: live decoding disagrees with replay: spec doctor {each.run}" for each in doubtful)]
