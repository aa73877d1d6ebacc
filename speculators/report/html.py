"""The report of runs as one HTML page: no script, nothing from elsewhere, and every text of a file escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from speculators.bench.conclusion import conclude
from speculators.bench.result import Acceptance, Live, Setting
from speculators.bench.speed import Speed
from speculators.diff.comparison import value_text
from speculators.report.bench import BINS, acceptance_cells, bin_cells, definitions, live_mark, number_text
from speculators.report.conclusion import conclusion_line, notes, settings_by_place
from speculators.report.figures import acceptance_figures, runs_by_place, training_figures
from speculators.report.gather import Report, RunDiff, RunReport
from speculators.report.plots import check_matplotlib
from speculators.report.progress import duration
from speculators.report.seeds import SeedSpread, seed_groups, seed_rows
from speculators.report.sheet import SHEET

# A browser that obeys this fetches nothing and runs nothing, whatever a file may have smuggled in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# The settings of a benchmark that say where and how it was measured.
_WHERE = ("speculator", "verifier", "device", "threads", "dtype", "seed", "max_new_tokens")


def page(report: Report) -> str:
    """Writes the page.

    Raises:
        SpeculatorsError: the plotting library is not installed.
    """
    check_matplotlib()
    runs = report.runs
    sections = {
        "Difference": "".join(map(_difference, report.diffs)),
        "Acceptance": _acceptance(runs),
        "Training": _plots(training_figures(runs)),
        "Plan": _plan(runs),
        "Lock": _side_by_side({run.label: run.lock for run in runs}),
        "Recipe": _recipe(runs),
    }
    filled = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in filled)
    body = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{html}</section>' for name, html in filled.items())
    title = " / ".join(run.name for run in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{SHEET}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>{_lead(runs)}<nav>{links}</nav>{body}\n</body>\n</html>\n"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, narrow: bool = False, marked: Sequence[int] = ()
) -> str:
    """Formats a table in a box of its own that scrolls sideways.

    Args:
        columns: headings, as text.
        rows: cells, as HTML.
        narrow: whether cells stay on one line.
        marked: indices of highlighted rows.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f"<tr{' class=differs' if index in marked else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for index, row in enumerate(rows)
    )
    kind = " class=narrow" if narrow else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(columns[0])}" tabindex="0">'
        f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _lead(runs: Sequence[RunReport]) -> str:
    """Formats the summary of each run, how far it came, and what is missing."""
    parts = []
    for run in runs:
        also = f" ({escape(run.name)})" if run.label != run.name else ""
        name = f"<b>{escape(run.label)}</b>{also}: " if len(runs) > 1 else ""
        summary = f' <span class="note">{escape(run.summary)}</span>' if run.summary else ""
        parts.append(f"<p>{name}{escape(run.state)}.{summary}</p>")
        if run.missing:
            parts.append(f"<ul>{''.join(f'<li class=bad>{escape(line)}</li>' for line in run.missing)}</ul>")
    return "".join(parts)


def _plots(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _acceptance(runs: Sequence[RunReport]) -> str:
    every = [setting for run in runs for setting in run.settings]
    if not every:
        return ""
    parts = [*_conclusions(runs), _over_seeds(runs), _plots(acceptance_figures(runs)), _settings_table(runs)]
    lines = _notes(runs)
    parts += [f'<p class="bad">{escape(line)}</p>' for style, line in lines if style == "bad"]
    parts += [f"<p>{escape(line)}</p>" for run in runs for line in run.expect]
    parts += [f'<p class="note">{escape(line)}</p>' for line in definitions(every).splitlines()]
    quiet = "".join(f'<p class="note">{escape(line)}</p>' for style, line in lines if style != "bad")
    parts += [f"<details><summary>Replay beside live</summary>{quiet}</details>"] if quiet else []
    parts.append(f"<details><summary>By category</summary>{_category_table(runs)}</details>")
    if any(setting.by_context for setting in every):
        tables = "".join(_bins_table(runs, field) for field in BINS)
        parts.append(f"<details><summary>By context and by place in the answer</summary>{tables}</details>")
    parts.append(f"<details><summary>Where it was measured</summary>{_measured_on(runs)}</details>")
    return "".join(parts)


def _conclusions(runs: Sequence[RunReport]) -> list[str]:
    """Formats what each suite and temperature of each run comes to."""
    lines = []
    for run in runs:
        places = settings_by_place(run.settings)
        for (suite, temperature), settings in places.items():
            owner = [run.label] if len(runs) > 1 else []
            place = [f"{suite}, T={temperature:g}"] if len(places) > 1 else []
            lines.append(": ".join([*owner, *place, conclusion_line(conclude(settings))]))
    return [f'<p class="lead">{escape(line)}</p>' for line in lines]


def _over_seeds(runs: Sequence[RunReport]) -> str:
    """Formats mean and spread of each group of runs that differ in the seed alone."""
    parts = []
    groups = seed_groups([run.recipe for run in runs])
    for group in groups:
        members = [runs[index] for index in group]
        names = ", ".join(run.label for run in members)
        rows = [
            [escape(row.suite), f"{row.temperature:g}", str(row.num_speculative_tokens), str(row.seeds)]
            + [_spread(row.tau, 3), _range(row.tau, 3)]
            + (["", ""] if row.speed_up is None else [_spread(row.speed_up, 2), _range(row.speed_up, 2)])
            for row in seed_rows([run.settings for run in members])
        ]
        columns = ("suite", "T", "K", "seeds", "tau, mean ± deviation", "range", "speed-up", "range")
        if rows:
            parts.append(f"<h3>Over seeds: {escape(names)}</h3>{table(columns, rows, narrow=True)}")
    return "".join(parts)


def _spread(spread: SeedSpread, digits: int) -> str:
    return f"{number_text(spread.mean, digits)} ± {number_text(spread.deviation, digits)}"


def _range(spread: SeedSpread, digits: int) -> str:
    return f"{number_text(spread.low, digits)} to {number_text(spread.high, digits)}"


def _notes(runs: Sequence[RunReport]) -> list[tuple[str, str]]:
    """Lists what to know beside the numbers, as (style, line)."""
    lines = []
    short = {run.name: run.label for run in runs}
    for (suite, temperature), by_run in runs_by_place(runs).items():
        for name, settings in by_run.items():
            place = f"{f'{short[name]}, ' if len(runs) > 1 else ''}{suite}, T={temperature:g}: "
            lines += [(style, place + line) for style, line in notes(settings)]
    return lines


def _settings_table(runs: Sequence[RunReport]) -> str:
    """Formats all settings; several runs stand under each other wherever they measured the same."""
    columns = ["run", "suite", "T", "K", "drafts", "tau (95%)", "live tau", "speed-up", "accepted by position"]
    columns += ["given reached", "drafted", "draft + verify ms", "tokens/s", "prompts"]
    rows = []
    short = {run.name: run.label for run in runs}
    for (suite, temperature), by_run in runs_by_place(runs).items():
        settings = [(setting, short[name]) for name, of_run in by_run.items() for setting in of_run]
        for setting, name in sorted(settings, key=lambda pair: pair[0].num_speculative_tokens):
            rows += _setting_rows([name, suite, f"{temperature:g}"], setting)
    skip = 0 if len(runs) > 1 else 1
    return table(columns[skip:], [row[skip:] for row in rows], narrow=True)


def _setting_rows(place: list[str], setting: Setting) -> list[list[str]]:
    """Formats the row of the speculator, and those of the baselines and of the trees."""
    live, k = setting.live, str(setting.num_speculative_tokens)
    drafters = [(k, "speculator", setting.exact, _live(live), live.speed if live else None)]
    for one in setting.baselines:
        tau = "" if one.live_tau is None else number_text(one.live_tau, 3)
        drafters.append((k, one.name, one.acceptance, tau, one.speed))
    rows = [_drafter_row(place, *drafter) for drafter in drafters]
    for tree in setting.trees:
        speed = tree.live.speed if tree.live else None
        if tree.exact is not None:
            rows.append(_drafter_row(place, tree.name, "speculator", tree.exact, _live(tree.live), speed))
        else:
            head = [*map(escape, (*place, tree.name)), "speculator", "live only", _live(tree.live)]
            speed_up, *cost = _speed(speed)
            rows.append([*head, speed_up, "", "", str(tree.nodes), *cost, ""])
    return rows


def _drafter_row(
    place: list[str], shape: str, name: str, acceptance: Acceptance, live_tau: str, speed: Speed | None
) -> list[str]:
    """Formats one row; `shape` is K, or that of a tree."""
    _, tau, *rates = (escape(cell) for cell in acceptance_cells(shape, acceptance))
    speed_up, *cost = _speed(speed)
    head = [*map(escape, place), escape(shape), escape(name), tau, live_tau, speed_up]
    return [*head, *rates, *cost, str(acceptance.prompts)]


def _live(live: Live | None) -> str:
    if live is None:
        return "not asked"
    style, mark = live_mark(live.agreement)
    return f'{number_text(live.acceptance.tau, 3)} <span class="{style}">{mark}</span>'


def _speed(speed: Speed | None) -> list[str]:
    """Formats speed-up, the cost of a round, and tokens per second."""
    if speed is None:
        return ["", "", ""]
    cost = f"{1e3 * speed.draft_seconds:.1f} + {1e3 * speed.verify_seconds:.1f}"
    speed_up = f"{speed.speed_up:.2f}x"
    marked = f'<span class="bad">{speed_up}?</span>' if speed.unmatched_baseline else speed_up
    return [marked, cost, f"{speed.speculative:.1f}"]


def _category_table(runs: Sequence[RunReport]) -> str:
    rows = []
    for run in runs:
        for setting in run.settings:
            place = f"{setting.suite}, T={setting.temperature:g}"
            for category, acceptance in setting.by_category.items():
                k, tau, rates, *_ = acceptance_cells(setting.num_speculative_tokens, acceptance)
                cells = [run.label, place, k, category or "-", str(acceptance.prompts), tau, rates]
                rows.append([escape(cell) for cell in cells])
    columns = ["run", "suite", "K", "category", "prompts", "tau (95%)", "accepted by position"]
    skip = 0 if len(runs) > 1 else 1
    return table(columns[skip:], [row[skip:] for row in rows], narrow=True)


def _bins_table(runs: Sequence[RunReport], field: str) -> str:
    rows = []
    for run in runs:
        for setting in run.settings:
            place = [run.label, f"{setting.suite}, T={setting.temperature:g}", str(setting.num_speculative_tokens)]
            rows += [[escape(cell) for cell in (*place, *bin_cells(each))] for each in getattr(setting, field)]
    columns = ["run", "suite", "K", "known", "prompts", "tokens", "tau (95%)"]
    skip = 0 if len(runs) > 1 else 1
    return f"<h3>{escape(BINS[field])}</h3>" + table(columns[skip:], [row[skip:] for row in rows], narrow=True)


def _measured_on(runs: Sequence[RunReport]) -> str:
    rows = [
        [run.label, file, *(str(getattr(result, name)) for name in _WHERE)]
        for run in runs
        for file, result in run.benches.items()
    ]
    return table(["run", "file", *_WHERE], [[escape(cell) for cell in row] for row in rows])


def _plan(runs: Sequence[RunReport]) -> str:
    parts = []
    for run in runs:
        rows = []
        for stage in run.stages:
            time = "" if stage.seconds is None else duration(stage.seconds)
            cells = (stage.name, stage.status, time, (stage.fingerprint or "")[:16], stage.detail)
            rows.append([escape(cell) for cell in cells])
        if rows:
            head = f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else ""
            parts.append(head + table(["stage", "status", "time", "fingerprint", "detail"], rows))
    return "".join(parts) + _side_by_side({run.label: run.plan for run in runs})


def _side_by_side(values: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the values of each run by their keys, a column for each run; rows that differ are marked."""
    keys = list(dict.fromkeys(key for of_run in values.values() for key in of_run))
    if not keys:
        return ""
    rows = [[value_text(of_run[key]) if key in of_run else "-" for of_run in values.values()] for key in keys]
    marked = [index for index, row in enumerate(rows) if len(set(row)) > 1]
    columns = ["key", *values] if len(values) > 1 else ["key", "value"]
    cells = [[escape(key), *map(escape, row)] for key, row in zip(keys, rows, strict=True)]
    return table(columns, cells, marked=marked)


def _difference(diff: RunDiff) -> str:
    head = f"<h3>{escape(diff.a)} → {escape(diff.b)}</h3>"
    comparison = diff.comparison
    if comparison is None:
        return f'{head}<p class="bad">cannot be compared: {escape(diff.error)}</p>'
    parts = [head]
    if comparison.changes:
        rows = [
            [escape(each) for each in (c.path, value_text(c.before), value_text(c.after), c.consequence)]
            for c in comparison.changes
        ]
        parts.append(table(["key", diff.a, diff.b, "means"], rows))
    else:
        parts.append(f"<p>{comparison.without_changes}</p>")
    if comparison.stages:
        parts.append(f"<p>Stages: {escape('; '.join(map(str, comparison.stages)))}.</p>")
    parts.append(f"<p><b>{escape(comparison.headline)}</b>: {escape('; '.join(comparison.reasons))}.</p>")
    if comparison.runs is not None:
        parts += [f"<p>{escape(str(row))}</p>" for row in comparison.runs.metrics]
        for key, (before, after) in comparison.runs.environment.items():
            parts.append(f'<p class="note">{escape(f"{key}: {before} → {after}")}</p>')
    parts += [f'<p class="note">{escape(note)}</p>' for note in comparison.notes]
    return "".join(parts)


def _recipe(runs: Sequence[RunReport]) -> str:
    resolved = _side_by_side({run.label: run.recipe for run in runs})
    parts = [f"<details><summary>Every value</summary>{resolved}</details>"] if resolved else []
    for run in runs:
        if run.recipe_text:
            owner = f" of {escape(run.label)}" if len(runs) > 1 else ""
            parts.append(f"<details><summary>The file{owner}</summary><pre>{escape(run.recipe_text)}</pre></details>")
    return "".join(parts)
