"""The acceptance tables of a benchmark, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.bench.bins import TokenBin
from speculators.bench.referee import Agreement
from speculators.bench.result import Acceptance, BenchResult, Live, Setting, TreeRow
from speculators.bench.speed import Speed
from speculators.report.conclusion import notes, settings_by_place
from speculators.report.console import Uncut

# Fits into 80 columns.
NARROW = ("drafts", "K", "tau (95%)", "live", "speed-up")
WIDE = (
    "drafts",
    "K",
    "tau (95%)",
    "accepted by position",
    "given reached",
    "drafted",
    "live",
    "draft + verify ms",
    "tokens/s",
    "speed-up",
)

# CPUs used by other processes from which the report warns of longer times.
LOADED = 0.3
# Titles of the tables, by the field of `Setting` that holds their bins.
BINS = {
    "by_context": "by tokens known when a round begins",
    "by_place": "by tokens of the answer known then",
}


def bench_tables(result: BenchResult, *, wide: bool = False, details: bool = False) -> RenderableType:
    """Renders the table of each suite and temperature, what to know beside it, and the definitions of the numbers.

    Args:
        wide: whether to add the columns and the categories that do not fit into 80 columns, and each live criterion.
        details: whether to add acceptance by length of the context and by place in the answer.
    """
    where = f"with {result.verifier}\nin {result.dtype} on {result.device}, {result.threads} threads"
    parts: list[RenderableType] = [
        Text.assemble(("\nacceptance of ", "title"), (result.speculator, "name")),
        Text(where, style="note"),
    ]
    if result.others is not None and result.others >= LOADED:
        busy = f"other processes used {result.others:.1f} CPUs meanwhile, so times are longer than on an idle machine"
        parts.append(Text(busy, style="warn"))
    for (suite, temperature), settings in settings_by_place(result.settings).items():
        table = _main_table(suite, temperature, settings, wide=wide)
        parts += [Text(), *((Uncut(table), Uncut(_category_table(settings))) if wide else (table,))]
        parts += [part for field in BINS if details for part in (Text(), _bins_table(field, settings))]
        parts += [Text(line, style=style) for style, line in notes(settings, wide=wide)]
    parts.append(Text("\n" + definitions(result.settings), style="note"))
    return Group(*parts)


def definitions(settings: Sequence[Setting]) -> str:
    """Formats the definition of every number, with one line for settings that differ in K alone, and one for trees."""
    ks_by_line: dict[str, list[str]] = {}
    for setting in settings:
        k = str(setting.num_speculative_tokens)
        ks = ks_by_line.setdefault(setting.definition.replace(f"K={k}", "K={}"), [])
        ks += [k] if k not in ks else []
    lines = [line.replace("K={}", f"K={', '.join(ks)}") for line, ks in ks_by_line.items()]
    # Those of trees differ in what is drafted.
    trees: dict[str, list[str]] = {}
    for line in dict.fromkeys(tree.definition for setting in settings for tree in setting.trees):
        head, _, drafts = line.partition("; drafts: ")
        trees.setdefault(head, []).append(drafts)
    return "\n".join([*lines, *(f"{head}; drafts: {'; '.join(each)}" for head, each in trees.items())])


def _main_table(suite: str, temperature: float, settings: Sequence[Setting], *, wide: bool) -> Table:
    title = f"{suite}, T={temperature:g}, {settings[0].exact.prompts} prompts"
    table = Table(title=title, title_justify="left", box=None)
    columns = WIDE if wide else NARROW
    for column in columns:
        # A drafter may have a long path for a name; numbers are never broken.
        if column == "drafts":
            table.add_column(column, header_style="title", overflow="fold")
        else:
            table.add_column(column, justify="right", header_style="title", no_wrap=True)
    for cells in _rows(settings):
        table.add_row(*(cells.get(column, "") for column in columns))
    return table


def _rows(settings: Sequence[Setting]) -> list[dict[str, str]]:
    """Formats the cells of each row by their columns."""
    rows = []
    for setting in settings:
        live = setting.live
        cells = _cells("speculator", setting.num_speculative_tokens, setting.exact, live.speed if live else None)
        rows.append(cells | {"live": _live_cell(live)})
    # Baselines were decoded at the largest K only.
    largest = max(settings, key=lambda setting: setting.num_speculative_tokens)
    for baseline in largest.baselines:
        tau = "" if baseline.live_tau is None else number_text(baseline.live_tau, 3)
        cells = _cells(escape(baseline.name), largest.num_speculative_tokens, baseline.acceptance, baseline.speed)
        rows.append(cells | {"live": tau})
    rows += [_tree_cells(tree) for tree in largest.trees]
    if largest.live:
        speed = f"{largest.live.speed.plain:.1f}"
        rows.append({"drafts": "plain", "tau (95%)": "1.000", "tokens/s": speed, "speed-up": "1.00x"})
    return rows


def _cells(name: str, k: int | str, acceptance: Acceptance, speed: Speed | None) -> dict[str, str]:
    rates = dict(zip(WIDE[1:6], acceptance_cells(k, acceptance), strict=True))
    return {"drafts": name, **rates, **dict(zip(WIDE[7:], _speed_cells(speed), strict=True))}


def _tree_cells(tree: TreeRow) -> dict[str, str]:
    """Formats a tree's row; one that replay does not know shows live decoding's tau, without an interval's weight."""
    speed = tree.live.speed if tree.live else None
    if tree.exact is not None:
        cells = _cells("speculator", tree.name, tree.exact, speed)
    else:
        cells = {"drafts": "speculator", "K": tree.name, "tau (95%)": "live only"}
        cells |= dict(zip(WIDE[7:], _speed_cells(speed), strict=True))
    return cells | {"live": _live_cell(tree.live)}


def acceptance_cells(k: int | str, acceptance: Acceptance) -> tuple[str, str, str, str, str]:
    """Formats K or a tree's shape, tau with its interval, both rates by position, and the tokens drafted per round."""
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
    style, text = live_mark(live.agreement)
    return f"{number_text(live.acceptance.tau, 3)} [{style}]{text}[/]"


def live_mark(agreement: Agreement) -> tuple[str, str]:
    """Gives the style and the text of whether live agrees with replay; a disagreement is shouted."""
    style = {"agrees": "good", "disagrees": "bad"}.get(agreement.verdict, "note")
    return style, agreement.verdict.upper() if style == "bad" else agreement.verdict


def _speed_cells(speed: Speed | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    cost = f"{1e3 * speed.draft_seconds:.1f} + {1e3 * speed.verify_seconds:.1f}"
    speed_up = f"{speed.speed_up:.2f}x"
    return cost, f"{speed.speculative:.1f}", f"[warn]{speed_up}?[/]" if speed.unmatched_baseline else speed_up


def _category_table(settings: Sequence[Setting]) -> Table:
    # Interval and positions for the largest K only, or the table would be wider still.
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


def _bins_table(field: str, settings: Sequence[Setting]) -> Table:
    *smaller, largest = sorted(settings, key=lambda setting: setting.num_speculative_tokens)
    table = Table(title=BINS[field], title_justify="left", box=None)
    taus = [f"tau K={setting.num_speculative_tokens}" for setting in smaller]
    for name in ("known", "prompts", "tokens", *taus, f"tau K={largest.num_speculative_tokens} (95%)"):
        table.add_column(name, justify="right", header_style="title", no_wrap=True)
    others = [{each.up_to: each.tau for each in getattr(setting, field)} for setting in smaller]
    for each in getattr(largest, field):
        *counts, tau = bin_cells(each)
        table.add_row(*counts, *(number_text(by_range.get(each.up_to), 3) for by_range in others), tau)
    return table


def bin_cells(each: TokenBin) -> tuple[str, str, str, str]:
    """Formats the range of known tokens, the prompts, the tokens emitted, and tau with its interval."""
    low, high = each.tau_interval
    tau = f"{number_text(each.tau, 3)} ({number_text(low, 2)} to {number_text(high, 2)})"
    return f"{each.fewest:,} to {each.up_to:,}", str(len(each.by_prompt)), f"{each.tokens:,.0f}", tau


def rates_text(rates: Sequence[float]) -> str:
    """Formats rates by position, with "-" for a position that was never reached."""
    return " ".join(number_text(rate, 2) for rate in rates)


def number_text(value: float | None, digits: int) -> str:
    """Formats a number with `digits` decimals, None and NaN as "-"."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
