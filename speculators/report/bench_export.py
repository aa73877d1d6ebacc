"""Benchmarks as text for papers and spreadsheets: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from speculators.bench.comparison import BenchComparison, ComparedRow
from speculators.bench.paired import SHARE
from speculators.report.bench import acceptance_cells, definitions
from speculators.report.bench_compare import difference_text
from speculators.structure.validators import HYBRID

COLUMNS = ("suite", "T", "drafts", "K", "tau (95%)", "accepted by position", "speed-up")
NUMERIC = ("T", "K", "tau (95%)", "speed-up")
_TEX = {character: f"\\{character}" for character in "&%$#_{}"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def to_csv(comparison: BenchComparison) -> str:
    """Writes one line for each drafter and setting, with unrounded numbers; what was not measured is empty."""
    rows = [_values(row, comparison.first) for row in comparison.rows]
    # Rows with a larger K have more columns.
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_markdown(comparison: BenchComparison) -> str:
    """Writes a table with the definitions of its numbers below it."""
    header, *rows = _table(comparison)
    rule = ["---:" if name in NUMERIC else "---" for name in header]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, rule, *rows)]
    return "\n".join([*lines, "", f"{_definitions(comparison)}."]) + "\n"


def to_latex(comparison: BenchComparison) -> str:
    """Writes a tabular environment; it needs the package booktabs."""
    header, *rows = _table(comparison)
    columns = "".join("r" if name in NUMERIC else "l" for name in header)
    head, *body = (" & ".join(map(_tex, row)) + r" \\" for row in (header, *rows))
    comment = "".join(f"% {line}\n" for line in _definitions(comparison).splitlines())
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return comment + "\n".join([*lines, r"\end{tabular}"]) + "\n"


FORMS: dict[str, Callable[[BenchComparison], str]] = {"csv": to_csv, "md": to_markdown, "latex": to_latex}


def _table(comparison: BenchComparison) -> list[Sequence[str]]:
    """Formats the header and the rows; differences only where there are any."""
    compared = any(row.difference for row in comparison.rows)
    header = (*COLUMNS, f"difference from {comparison.first} (95%)") if compared else COLUMNS
    return [header, *((*_cells(row), *([_difference(row)] if compared else ())) for row in comparison.rows)]


def _cells(row: ComparedRow) -> tuple[str, ...]:
    k, tau, positions, *_ = acceptance_cells(row.setting.num_speculative_tokens, row.acceptance)
    speed_up = f"{row.speed.speed_up:.2f}" if row.speed else ""
    place = (row.setting.suite, f"{row.setting.temperature:g}")
    return (*place, _drafts(row), k, tau, positions, speed_up)


def _drafts(row: ComparedRow) -> str:
    """Names a row's drafter; that of a hybrid in part is the speculator."""
    is_hybrid = row.baseline.partition(":")[0] == HYBRID
    return f"{row.baseline} with {row.speculator}" if is_hybrid else row.baseline or row.speculator


def _difference(row: ComparedRow) -> str:
    if row.difference:
        return difference_text(row.difference)
    return f"not compared: {row.incomparable}" if row.incomparable else ""


def _definitions(comparison: BenchComparison) -> str:
    return definitions([row.setting for row in comparison.rows])


def _values(row: ComparedRow, first: str) -> dict[str, Any]:
    acceptance, difference = row.acceptance, row.difference
    values: dict[str, Any] = {
        "suite": row.setting.suite,
        "temperature": row.setting.temperature,
        "prompts": acceptance.prompts,
        "speculator": row.speculator,
        "baseline": row.baseline,
        "K": row.setting.num_speculative_tokens,
        "definition": row.setting.definition,
        "tau": acceptance.tau,
        "tau_low": acceptance.tau_interval[0],
        "tau_high": acceptance.tau_interval[1],
        "drafted": acceptance.drafted,
        "speed_up": row.speed.speed_up if row.speed else "",
        "compared_with": first if difference else "",
        "difference": difference.mean if difference else "",
        "difference_low": difference.low if difference else "",
        "difference_high": difference.high if difference else "",
        "difference_shown": ("yes" if difference.shown else "no") if difference else "",
        f"prompts_for_{100 * SHARE:g}_percent": difference.prompts_for_share if difference else "",
    }
    none = (("", ""),) * len(acceptance.by_position)
    intervals = acceptance.by_position_interval or none
    for position, (rate, (low, high)) in enumerate(zip(acceptance.by_position, intervals, strict=True), start=1):
        name = f"accepted_{position}"
        values |= {name: rate, f"{name}_low": low, f"{name}_high": high}
    return {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
