"""Which plots a report has: each an HTML figure with its caption and the names of its lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import attrs

from speculators.report.plots import COLOURS, Series, dots, lines

Values = Mapping[str, Any]


def training_figures(runs: Sequence[Values]) -> list[str]:
    """Returns loss and exact acceptance length over the updates, the runs over each other."""
    figures = []
    for key, title, axis in (("loss", "Loss", "loss"), ("tau", "Exact tau during training", "tau")):
        series = [
            Series(
                name=run["name"], x=[at for at, _ in run[key]], y=_column(run[key]), colour=index, marks=key == "tau"
            )
            for index, run in enumerate(runs)
            if run[key]
        ]
        told = "; ".join(dict.fromkeys(run["tau_of"] for run in runs if run["tau_of"])) if key == "tau" else ""
        note = f"{told}; the held-out suite by replay" if told else "mean over the supervised tokens of an update"
        if series:
            figures.append(_figure(title, note, series, lines(key, series, x="update", y=axis)))
    return figures


def acceptance_figures(runs: Sequence[Values]) -> list[str]:
    """Returns acceptance by position, tau and speed-up by K, and tau by category, as far as they were measured."""
    groups = list(_groups(runs))
    if not groups:
        return []
    figures = [
        _by_position(groups, "by_position", "Accepted by position", "share of rounds that accept the draft there"),
        _by_position(groups, "by_position_conditional", "Accepted, given reached", "of the rounds that get there"),
        _tau_by_k(groups),
    ]
    figures += [speed] if (speed := _speed_by_k(groups)) else []
    return figures + _by_category(runs)


Group = tuple[str, Sequence[Values]]


def _groups(runs: Sequence[Values]) -> Iterable[Group]:
    """Yields the settings of each (run, suite, T), K rising, under a name that says what tells them apart."""
    found: dict[tuple[str, str, float], list[Values]] = {}
    for run in runs:
        for setting in run["settings"]:
            found.setdefault((run["name"], setting["suite"], setting["temperature"]), []).append(setting)
    several = len({key[1:] for key in found}) > 1
    for (run_name, suite, temperature), settings in found.items():
        place = f"{suite}, T={temperature:g}"
        name = (f"{run_name}: {place}" if several else run_name) if len(runs) > 1 else place
        yield name, sorted(settings, key=lambda setting: int(setting["num_speculative_tokens"]))


def _by_position(groups: Sequence[Group], key: str, title: str, note: str) -> str:
    series = []
    for index, (name, settings) in enumerate(groups):
        rates = settings[-1]["exact"][key]
        label = f"{name}, K={settings[-1]['num_speculative_tokens']}"
        series.append(Series(name=label, x=range(1, len(rates) + 1), y=rates, colour=index, marks=True))
    return _figure(title, note, series, lines(key, series, x="position in the draft", y="probability", whole_x=True))


@attrs.frozen(kw_only=True)
class Drafter:
    """The speculator or a baseline in one group; each row is (K, acceptance, speed or None)."""

    name: str
    dashed: bool
    rows: Sequence[tuple[int, Values, Values | None]]


def _drafters(groups: Sequence[Group]) -> list[Drafter]:
    """Returns the speculators, then the baselines, which are drawn dashed."""
    own, others = [], []
    for name, settings in groups:
        rows: list[tuple[int, Values, Values | None]] = []
        baselines: dict[str, list[tuple[int, Values, Values | None]]] = {}
        for setting in settings:
            k, live = setting["num_speculative_tokens"], setting["live"]
            rows.append((k, setting["exact"], live["speed"] if live else None))
            for one in setting["baselines"]:
                baselines.setdefault(one["name"], []).append((k, one["acceptance"], one["speed"]))
        own.append(Drafter(name=name, dashed=False, rows=rows))
        of = "" if len(groups) == 1 else f", {name}"
        others += [Drafter(name=baseline + of, dashed=True, rows=held) for baseline, held in baselines.items()]
    return [*own, *others]


def _tau_by_k(groups: Sequence[Group]) -> str:
    series = [
        Series(
            name=drafter.name,
            x=[k for k, _, _ in drafter.rows],
            y=[acceptance["tau"] for _, acceptance, _ in drafter.rows],
            intervals=[acceptance["tau_interval"] for _, acceptance, _ in drafter.rows],
            colour=index,
            dashed=drafter.dashed,
            marks=True,
        )
        for index, drafter in enumerate(_drafters(groups))
    ]
    plot = lines("tau-k", series, x="K, tokens drafted a round", y="tau", whole_x=True)
    return _figure("Tau by K", "exact, by replay; bars are 95% intervals over prompts", series, plot)


def _speed_by_k(groups: Sequence[Group]) -> str:
    """Returns the figure, "" where no speed was measured."""
    series = []
    for index, drafter in enumerate(_drafters(groups)):
        if known := [(k, speed["speed_up"]) for k, _, speed in drafter.rows if speed]:
            ks, values = zip(*known, strict=True)
            series.append(Series(name=drafter.name, x=ks, y=values, colour=index, dashed=drafter.dashed, marks=True))
    if not series:
        return ""
    note = "tokens a second against plain decoding: same device, engine, prompts, sampling"
    plot = lines("speed-k", series, x="K, tokens drafted a round", y="speed-up", whole_x=True, level=1.0)
    return _figure("Speed-up by K", note, series, plot)


def _by_category(runs: Sequence[Values]) -> list[str]:
    """Returns a figure for each suite and temperature that has categories, at its largest K."""
    places = dict.fromkeys((s["suite"], s["temperature"]) for run in runs for s in run["settings"])
    figures = []
    for suite, temperature in places:
        chosen = [(index, run["name"], _largest(run, suite, temperature)) for index, run in enumerate(runs)]
        held = [(index, name, setting) for index, name, setting in chosen if setting]
        labels = list(dict.fromkeys(label for _, _, setting in held for label in setting["by_category"]))
        if len(labels) < 2:
            continue
        series = []
        for index, name, setting in held:
            rows = setting["by_category"]
            at = [row for row, label in enumerate(labels) if label in rows]
            taus, intervals = ([rows[labels[row]][key] for row in at] for key in ("tau", "tau_interval"))
            label = f"{name}, K={setting['num_speculative_tokens']}"
            series.append(Series(name=label, x=at, y=taus, intervals=intervals, colour=index))
        title = f"Tau by category: {suite}, T={temperature:g}"
        plot = dots(f"category-{suite}-{temperature:g}", labels, series, x="tau")
        k = held[0][2]["num_speculative_tokens"]
        figures.append(_figure(title, f"K={k}; bars are 95% intervals over prompts", series, plot))
    return figures


def _largest(run: Values, suite: str, temperature: float) -> Values | None:
    own = [s for s in run["settings"] if (s["suite"], s["temperature"]) == (suite, temperature)]
    return max(own, key=lambda setting: int(setting["num_speculative_tokens"])) if own else None


def _column(points: Sequence[Sequence[float]]) -> list[float]:
    return [value for _, value in points]


def _figure(title: str, note: str, series: Sequence[Series], plot: str) -> str:
    caption = f'<figcaption>{escape(title)}<span class="note">{escape(note)}</span></figcaption>'
    keys = "".join(
        f'<span style="color: var(--s{one.colour % COLOURS})"><i{" class=dashed" if one.dashed else ""}></i>'
        f"{escape(one.name)}</span>"
        for one in series
    )
    named = plot.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1)
    return f'<figure>{caption}{named}<div class="keys">{keys}</div></figure>'
