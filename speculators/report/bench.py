"""The acceptance tables of a benchmark, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.bench.referee import Agreement
from speculators.bench.result import Acceptance, BenchResult, Live, Setting
from speculators.bench.speed import Speed

COLUMNS = (
    "drafts",
    "K",
    "tau (95%)",
    "accepted by position",
    "given reached",
    "drafted",
    "live tau",
    "draft + verify ms",
    "tokens/s",
    "speed-up",
)


def bench_tables(result: BenchResult) -> RenderableType:
    """Renders every table of a benchmark, and the definitions of its numbers."""
    where = f"{result.verifier}, {result.dtype}, {result.device}, {result.threads} threads"
    parts: list[RenderableType] = [
        Text.assemble(("\nacceptance of ", "title"), (result.speculator, "name"), (f"  ({where})", "note"))
    ]
    groups: dict[tuple[str, float], list[Setting]] = {}
    for setting in result.settings:
        groups.setdefault((setting.suite, setting.temperature), []).append(setting)
    for (suite, temperature), settings in groups.items():
        parts += [Text(), _main_table(suite, temperature, settings), _category_table(settings)]
        parts += [Text(line, style=style) for style, line in notes(settings)]
    parts.append(Text("\n" + definitions(result.settings), style="note"))
    return Group(*parts)


def definitions(settings: Iterable[Setting]) -> str:
    """Formats the definition of every number, with one line for settings that differ in K alone."""
    ks_by_line: dict[str, list[str]] = {}
    for setting in settings:
        k = str(setting.num_speculative_tokens)
        ks = ks_by_line.setdefault(setting.definition.replace(f"K={k}", "K={}"), [])
        ks += [k] if k not in ks else []
    return "\n".join(line.replace("K={}", f"K={', '.join(ks)}") for line, ks in ks_by_line.items())


def _main_table(suite: str, temperature: float, settings: Sequence[Setting]) -> Table:
    title = f"{suite}, T={temperature:g}, {settings[0].exact.prompts} prompts"
    table = Table(title=title, title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "drafts" else "right", header_style="title")
    for setting in settings:
        cells = acceptance_cells(setting.num_speculative_tokens, setting.exact)
        speed = setting.live.speed if setting.live else None
        table.add_row("speculator", *cells, _live_cell(setting.live), *_speed_cells(speed))
    # Baselines were decoded at the largest K only.
    largest = max(settings, key=lambda setting: setting.num_speculative_tokens)
    for baseline in largest.baselines:
        cells = acceptance_cells(largest.num_speculative_tokens, baseline.acceptance)
        tau = "" if baseline.live_tau is None else number_text(baseline.live_tau, 3)
        table.add_row(escape(baseline.name), *cells, tau, *_speed_cells(baseline.speed))
    if largest.live:
        table.add_row("plain", "", "1.000", "", "", "", "", "", f"{largest.live.speed.plain:.1f}", "1.00x")
    return table


def acceptance_cells(k: int, acceptance: Acceptance) -> tuple[str, str, str, str, str]:
    """Formats K, tau with its interval, both rates by position, and the tokens drafted per round."""
    low, high = acceptance.tau_interval
    return (
        str(k),
        f"{number_text(acceptance.tau, 3)} ({number_text(low, 2)} to {number_text(high, 2)})",
        rates_text(acceptance.by_position),
        rates_text(acceptance.by_position_conditional),
        number_text(acceptance.drafted, 2),
    )


def _live_cell(live: Live | None) -> str:
    if live is None:
        return "not asked"
    style, text = verdict(live.agreement)
    return f"{number_text(live.acceptance.tau, 3)} [{style}]{text}[/]"


def verdict(agreement: Agreement) -> tuple[str, str]:
    """Gives the style and the text of whether live agrees with replay; a disagreement is shouted."""
    style = {"agrees": "good", "disagrees": "bad"}.get(agreement.verdict, "note")
    return style, agreement.verdict.upper() if style == "bad" else agreement.verdict


def _speed_cells(speed: Speed | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    cost = f"{1e3 * speed.draft_seconds:.1f} + {1e3 * speed.verify_seconds:.1f}"
    flag = " [bad]unmatched baseline[/]" if speed.unmatched_baseline else ""
    return cost, f"{speed.speculative:.1f}", f"{speed.speed_up:.2f}x{flag}"


def _category_table(settings: Sequence[Setting]) -> Table:
    # Interval and positions for the largest K only: the table must fit into 120 columns.
    *smaller, largest = sorted(settings, key=lambda setting: setting.num_speculative_tokens)
    k = largest.num_speculative_tokens
    table = Table(title="by category", title_justify="left", box=None)
    taus = [f"tau K={setting.num_speculative_tokens}" for setting in smaller]
    for name in ("category", "prompts", *taus, f"tau K={k} (95%)", f"accepted by position, K={k}"):
        table.add_column(name, justify="left" if name == "category" else "right", header_style="title")
    for category, acceptance in largest.by_category.items():
        _, tau, rates, *_ = acceptance_cells(k, acceptance)
        others = [number_text(setting.by_category[category].tau, 3) for setting in smaller]
        table.add_row(escape(category) or "-", str(acceptance.prompts), *others, tau, rates)
    return table


def notes(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    """Lists what to know beside the numbers of one suite and temperature, as (style, line)."""
    first = settings[0]
    lines: list[tuple[str, str]] = []
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
            lines += _live_notes(setting.num_speculative_tokens, setting.live)
    return lines + _cost_note(settings)


def _live_notes(k: int, live: Live) -> list[tuple[str, str]]:
    agreement, acceptance = live.agreement, live.acceptance
    line = f"K={k}: on {acceptance.prompts} prompts replay predicts {agreement.predicted_tau:.4f}, "
    line += f"live measures {acceptance.tau:.4f} ({agreement.criterion})"
    if agreement.own_tau is not None:
        line += f"; over the verifier's own responses replay predicts {agreement.own_tau:.4f}"
    if agreement.near_ties:
        line += f"; {agreement.near_ties} responses compared up to a near-tie of the verifier's logits"
    lines = [("note", line)]
    if not agreement.agrees:
        lines.append(("bad", f"K={k}: {agreement.gap}"))
    if agreement.untold:
        lines.append(("note", f"K={k}: {agreement.untold} (--live N takes more)"))
    return lines


def _cost_note(settings: Sequence[Setting]) -> list[tuple[str, str]]:
    costs = {each.num_speculative_tokens: each.drafted_cost for each in settings if each.live}
    cost = costs[max(costs)] if costs else None
    if cost is None:
        return []
    line = (
        f"from the rounds of K={min(costs)} and K={max(costs)}: one more drafted token costs {cost:.2f} of a token of "
    )
    line += "plain decoding (draft and verification); one that is accepted less often slows decoding down"
    return [("note", line)]


def rates_text(rates: Sequence[float]) -> str:
    """Formats rates by position, with "-" for a position that was never reached."""
    return " ".join(number_text(rate, 2) for rate in rates)


def number_text(value: float | None, digits: int) -> str:
    """Formats a number with `digits` decimals, None and NaN as "-"."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
