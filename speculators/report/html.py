"""The report of runs as one HTML page: no script, nothing from elsewhere, every text of a file escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from speculators.diff.comparison import value_text
from speculators.report.bench import acceptance_cells, definitions, notes, verdict
from speculators.report.figures import acceptance_figures, settings_by_place, training_figures
from speculators.report.gather import RunDiff
from speculators.report.plots import check_matplotlib
from speculators.report.progress import duration
from speculators.report.sheet import SHEET

Values = Mapping[str, Any]

# A browser that obeys this fetches nothing and runs nothing, whatever a file has smuggled in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: Values) -> str:
    """Returns the page.

    Args:
        report: as `gather` returns it.

    Raises:
        SpeculatorsError: the plotting library is not installed.
    """
    check_matplotlib()
    runs = report["runs"]
    sections = {
        "Acceptance": _acceptance(runs),
        "Training": _plots(training_figures(runs)),
        "Plan": _plan(runs),
        "Lock": _side_by_side(runs, "lock"),
        "Difference": "".join(_difference(diff) for diff in report["diffs"]),
        "Recipe": _recipe(runs),
    }
    kept = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in kept)
    body = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>' for name, content in kept.items())
    title = " / ".join(run["name"] for run in runs)
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
    """Returns a table in a box of its own that scrolls sideways.

    Args:
        columns: headings, text.
        rows: cells, HTML.
        narrow: cells are kept on one line.
        marked: rows that are told apart.
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


def _lead(runs: Sequence[Values]) -> str:
    """Returns what each run is, how far it came, and what is missing."""
    parts = []
    for run in runs:
        name = f"<b>{escape(run['name'])}</b>: " if len(runs) > 1 else ""
        summary = f' <span class="note">{escape(run["summary"])}</span>' if run["summary"] else ""
        parts.append(f"<p>{name}{escape(run['state'])}.{summary}</p>")
        if run["missing"]:
            parts.append(f"<ul>{''.join(f'<li class=bad>{escape(words)}</li>' for words in run['missing'])}</ul>")
    return "".join(parts)


def _plots(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _acceptance(runs: Sequence[Values]) -> str:
    if not any(run["settings"] for run in runs):
        return ""
    parts = [_plots(acceptance_figures(runs)), _settings_table(runs)]
    told = _told(runs)
    parts += [f'<p class="bad">{escape(words)}</p>' for style, words in told if style == "bad"]
    parts += [f"<p>{escape(line)}</p>" for run in runs for line in run["expect"]]
    every = [setting for run in runs for setting in run["settings"]]
    parts += [f'<p class="note">{escape(line)}</p>' for line in definitions({"settings": every}).splitlines()]
    quiet = "".join(f'<p class="note">{escape(words)}</p>' for style, words in told if style != "bad")
    parts += [f"<details><summary>Replay beside live</summary>{quiet}</details>"] if quiet else []
    parts.append(f"<details><summary>By category</summary>{_category_table(runs)}</details>")
    parts.append(f"<details><summary>Where it was measured</summary>{_measured_on(runs)}</details>")
    return "".join(parts)


def _told(runs: Sequence[Values]) -> list[tuple[str, str]]:
    """Returns (style, words) of what must be known beside the numbers."""
    found = []
    for (suite, temperature), held in settings_by_place(runs).items():
        for name, settings in held.items():
            place = f"{f'{name}, ' if len(runs) > 1 else ''}{suite}, T={temperature:g}: "
            found += [(style, place + words) for style, words in notes(settings)]
    return found


def _settings_table(runs: Sequence[Values]) -> str:
    """Returns all settings, those of several runs under each other wherever they measured the same."""
    columns = ["run", "suite", "T", "K", "drafts", "tau (95%)", "live tau", "speed-up", "accepted by position"]
    columns += ["given reached", "drafted", "draft + verify ms", "tokens/s", "prompts"]
    rows = []
    for (suite, temperature), held in settings_by_place(runs).items():
        found = [(setting, name) for name, settings in held.items() for setting in settings]
        for setting, name in sorted(found, key=lambda one: int(one[0]["num_speculative_tokens"])):
            rows += _setting_rows([name, suite, f"{temperature:g}"], setting)
    skip = 0 if len(runs) > 1 else 1
    return table(columns[skip:], [row[skip:] for row in rows], narrow=True)


def _setting_rows(place: list[str], setting: Values) -> list[list[str]]:
    """Returns the row of the speculator and those of the baselines."""
    k, live = setting["num_speculative_tokens"], setting["live"]
    drafters = [("speculator", setting["exact"], _live(live), live["speed"] if live else None)]
    for one in setting["baselines"]:
        tau = "" if one["live_tau"] is None else f"{one['live_tau']:.3f}"
        drafters.append((one["name"], one["acceptance"], tau, one["speed"]))
    rows = []
    for name, acceptance, live_tau, speed in drafters:
        k_text, tau, *rates = (escape(cell) for cell in acceptance_cells(k, acceptance))
        speed_up, *cost = _speed(speed)
        head = [*map(escape, place), k_text, escape(name), tau, live_tau, speed_up]
        rows.append([*head, *rates, *cost, str(acceptance["prompts"])])
    return rows


def _live(live: Values | None) -> str:
    if live is None:
        return "not asked"
    style, words = verdict(live["agreement"])
    return f'{live["acceptance"]["tau"]:.3f} <span class="{style}">{words}</span>'


def _speed(speed: Values | None) -> list[str]:
    """Returns speed-up, the cost of a round, and tokens a second."""
    if speed is None:
        return ["", "", ""]
    cost = f"{1e3 * speed['draft_seconds']:.1f} + {1e3 * speed['verify_seconds']:.1f}"
    flag = ' <span class="bad">unmatched baseline</span>' if speed["unmatched_baseline"] else ""
    return [f"{speed['speed_up']:.2f}x{flag}", cost, f"{speed['speculative']:.1f}"]


def _category_table(runs: Sequence[Values]) -> str:
    rows = []
    for run in runs:
        for setting in run["settings"]:
            k, place = setting["num_speculative_tokens"], f"{setting['suite']}, T={setting['temperature']:g}"
            for category, acceptance in setting["by_category"].items():
                _, tau, rates, *_ = acceptance_cells(k, acceptance)
                cells = [run["name"], place, str(k), category or "-", str(acceptance["prompts"]), tau, rates]
                rows.append([escape(cell) for cell in cells])
    columns = ["run", "suite", "K", "category", "prompts", "tau (95%)", "accepted by position"]
    skip = 0 if len(runs) > 1 else 1
    return table(columns[skip:], [row[skip:] for row in rows], narrow=True)


def _measured_on(runs: Sequence[Values]) -> str:
    held = [(run["name"], bench) for run in runs for bench in run["benches"]]
    keys = list(held[0][1])
    return table(["run", *keys], [[escape(name), *(escape(str(bench[key])) for key in keys)] for name, bench in held])


def _plan(runs: Sequence[Values]) -> str:
    parts = []
    for run in runs:
        rows = []
        for stage in run["stages"]:
            time = "" if stage["seconds"] is None else duration(stage["seconds"])
            cells = (stage["name"], stage["status"], time, (stage["fingerprint"] or "")[:16], stage["detail"])
            rows.append([escape(cell) for cell in cells])
        if rows:
            head = f"<h3>{escape(run['name'])}</h3>" if len(runs) > 1 else ""
            parts.append(head + table(["stage", "status", "time", "fingerprint", "told"], rows))
    return "".join(parts) + _side_by_side(runs, "plan")


def _side_by_side(runs: Sequence[Values], part: str) -> str:
    """Returns the values of a part of each run, a column each; where they differ the row is marked."""
    keys = list(dict.fromkeys(key for run in runs for key in run[part]))
    if not keys:
        return ""
    rows = [[value_text(run[part][key]) if key in run[part] else "-" for run in runs] for key in keys]
    marked = [index for index, row in enumerate(rows) if len(set(row)) > 1]
    columns = ["key", *(run["name"] for run in runs)] if len(runs) > 1 else ["key", "value"]
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


def _recipe(runs: Sequence[Values]) -> str:
    resolved = _side_by_side(runs, "recipe")
    parts = [f"<details><summary>Every value</summary>{resolved}</details>"] if resolved else []
    for run in runs:
        if run["recipe_text"]:
            of = f" of {escape(run['name'])}" if len(runs) > 1 else ""
            parts.append(f"<details><summary>The file{of}</summary><pre>{escape(run['recipe_text'])}</pre></details>")
    return "".join(parts)
