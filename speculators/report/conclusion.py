"""What to know beside the numbers of a benchmark, its conclusion, and the commands that come next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from speculators.bench.conclusion import Conclusion, conclude
from speculators.bench.paired import SHARE, PairedDifference
from speculators.bench.result import BenchResult, Live, Setting

# (style, line).
Note = tuple[str, str]


def conclusion(result: BenchResult, run: Path | None) -> RenderableType:
    """Concludes a benchmark: a line for each suite and temperature, then the commands that come next.

    Args:
        run: the run as commands take it, a folder or a name; None where no run holds the result.
    """
    places = settings_by_place(result.settings)
    lines = [
        (f"{suite}, T={temperature:g}: " if len(places) > 1 else "") + conclusion_line(conclude(settings))
        for (suite, temperature), settings in places.items()
    ]
    if run is not None:
        # In ./runs a name is enough, and two commands fit into a line.
        run = Path(run.name) if run.parent == Path("runs") else run
        lines.append(f"Next: spec export {run}, spec report {run}" if result.agrees else f"Next: spec doctor {run}")
    return Text("\n" + "\n".join(lines), style="title")


def settings_by_place(settings: Iterable[Setting]) -> dict[tuple[str, float], list[Setting]]:
    """Groups settings by suite and temperature."""
    groups: dict[tuple[str, float], list[Setting]] = {}
    for setting in settings:
        groups.setdefault((setting.suite, setting.temperature), []).append(setting)
    return groups


def conclusion_line(conclusion: Conclusion) -> str:
    """Writes the conclusion of one suite and temperature as a sentence."""
    best, tau = conclusion.best, conclusion.best.exact.tau
    gain = "no pass was measured" if math.isnan(tau) else f"{tau:.2f} tokens a pass"
    if conclusion.speed_up is not None:
        slower = " (slower than plain)" if round(conclusion.speed_up, 2) < 1 else ""
        pace = f"{conclusion.speed_up:.2f}x here{slower}"
    else:
        pace = "its time is unreliable" if best.live else "its speed was not measured"
    return f"K = {best.num_speculative_tokens}: {gain}, {pace}."


def notes(settings: Sequence[Setting], *, wide: bool = True) -> list[Note]:
    """Lists what to know beside the numbers of one suite and temperature.

    Args:
        wide: whether to name each criterion of the live check.
    """
    first = settings[0]
    lines: list[Note] = []
    if first.cut_prompts:
        cut = f"{first.cut_prompts} responses diverge from the verifier's own output and are cut there"
        lines.append(("note", f"{cut}: {first.cut_tokens} tokens are left out"))
    if first.replaced_prompts:
        replaced = f"{first.replaced_prompts} answers of the suite are not this verifier's output and were regenerated"
        lines.append(("note", f"{replaced}, so tau is measured on different text than the suite's own answers"))
    if first.note:
        lines.append(("note", first.note))
    for setting in settings:
        if setting.live:
            lines += _live_notes(f"K={setting.num_speculative_tokens}", setting.live, wide=wide)
        for tree in setting.trees:
            if tree.live:
                lines += _live_notes(f"tree {tree.name}", tree.live, wide=wide)
    lines += _baseline_notes(settings) + _speed_note(settings) + _timing_notes(settings)
    return lines + _cost_note(conclude(settings))


def _live_notes(name: str, live: Live, *, wide: bool) -> list[Note]:
    agreement, acceptance = live.agreement, live.acceptance
    line = f"{name}: live check on {acceptance.prompts} prompts: {acceptance.tau:.3f}, "
    unknown = math.isnan(agreement.predicted_tau)
    line += "which replay cannot predict" if unknown else f"predicted {agreement.predicted_tau:.3f}"
    if agreement.own_tau is not None:
        line += f"; {agreement.own_tau:.3f} on the verifier's own answers"
    if wide:
        line += f" ({agreement.criterion})"
    if agreement.near_ties:
        line += f"; {agreement.near_ties} responses leave the verifier's own at a near-tie of its logits"
    lines = [("note", line)]
    if not agreement.agrees:
        lines.append(("bad", f"{name}: live and replay disagree: {agreement.gap}"))
    if agreement.untold:
        lines.append(("note", f"{name}: {agreement.untold} (--live N takes more)"))
    return lines


def _baseline_notes(settings: Sequence[Setting]) -> list[Note]:
    """Says how far the speculator is from each baseline, at the largest K."""
    largest = max(settings, key=lambda setting: setting.num_speculative_tokens)
    k = largest.num_speculative_tokens
    return [("note", comparison_line(each.difference, each.name, k)) for each in largest.baselines if each.difference]


def comparison_line(difference: PairedDifference, other: str, k: int) -> str:
    """Writes the difference from another drafter as a sentence, and how many prompts would show a small one."""
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    if difference.shown:
        line = (
            f"{difference.mean:+.3f} (95% {interval}) {'over' if difference.mean > 0 else 'against'} {other} at K={k}"
        )
    else:
        line = f"no difference from {other} shown at K={k} (95% {interval})"
    return f"{line}; {difference.prompts_for_share:,} prompts would show {SHARE:.0%}"


def _speed_note(settings: Sequence[Setting]) -> list[Note]:
    """Says what the speed-ups were measured on, and in which dtype where that is not the live check's."""
    lives = [(each.num_speculative_tokens, each.live) for each in settings if each.live]
    if not lives:
        return []
    _, first = lives[0]
    dtype = f" in {first.speed.dtype}" if first.speed.dtype else ""
    line = f"speed-ups: rounds timed on {first.acceptance.prompts} prompts{dtype}, at the whole suite's tau"
    ties = [
        f"{live.speed.near_ties} of {live.acceptance.prompts} at K={k}" for k, live in lives if live.speed.near_ties
    ]
    if ties:
        line += f"; there, answers leave the verifier's own at a near-tie of its logits: {', '.join(ties)}"
    return [("note", line)]


def _timing_notes(settings: Sequence[Setting]) -> list[Note]:
    """Names each speed-up that cannot be: a round costs a forward of the verifier or more."""
    largest = max(settings, key=lambda setting: setting.num_speculative_tokens)
    timed = [(f"K={each.num_speculative_tokens}", each.live.speed) for each in settings if each.live]
    timed += [(each.name, each.speed) for each in largest.baselines if each.speed]
    timed += [(f"tree {each.name}", each.live.speed) for each in largest.trees if each.live]
    return [("warn", f"{name}: {unreliable(speed.speed_up)}") for name, speed in timed if speed.unmatched_baseline]


def unreliable(speed_up: float) -> str:
    """Reports a speed-up that exceeds the acceptance length."""
    return f"{speed_up:.2f}x: more than tau allows, timing unreliable (machine busy?)"


def _cost_note(conclusion: Conclusion) -> list[Note]:
    if conclusion.extra_cost is None:
        return []
    line = f"each extra draft costs {conclusion.extra_cost:.0%} of a plain step"
    if conclusion.pays_above is None:
        return [("note", line)]
    line += f" and pays if accepted more than {conclusion.pays_above:.0%} of the time: "
    line += f"best K here is {conclusion.best.num_speculative_tokens}"
    if conclusion.untried is not None:
        line += f"; K={conclusion.untried} was not measured and may be faster (--k {conclusion.untried})"
    return [("note", line)]
