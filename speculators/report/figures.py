"""Which plots a report has: each an HTML figure with its caption and the names of its lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Returns acceptance by position, tau and speed-up by K, and tau by category, as far as they were measured.

    The settings of one run share their plots; of several runs each suite and temperature has its own.
    """
    places = settings_by_place(runs)
    several = len(runs) > 1
    # A run has one colour on all of the page, also where another one was not measured.
    colours = {run["name"]: index for index, run in enumerate(runs)}
    figures: list[str] = []
    if several:
        for place, held in places.items():
            groups = [Group(name=name, colour=colours[name], settings=settings) for name, settings in held.items()]
            figures += _acceptance(groups, f": {_place(place)}" if len(places) > 1 else "")
    elif places:
        alone = [(place, settings) for place, held in places.items() for settings in held.values()]
        groups = [Group(name=_place(at), colour=index, settings=held) for index, (at, held) in enumerate(alone)]
        figures += _acceptance(groups, "")
    return figures + [figure for place, held in places.items() for figure in _by_category(_place(place), held, runs)]


Place = tuple[str, float]


@attrs.frozen(kw_only=True)
class Group:
    """The settings of one run, suite and temperature, K rising; what one line of a plot is drawn from."""

    name: str
    colour: int
    settings: Sequence[Values]


def settings_by_place(runs: Sequence[Values]) -> dict[Place, dict[str, list[Values]]]:
    """Returns the settings of each (suite, T) by run, K rising; only runs that have some."""
    found: dict[Place, dict[str, list[Values]]] = {}
    for run in runs:
        for setting in sorted(run["settings"], key=lambda setting: int(setting["num_speculative_tokens"])):
            place = (setting["suite"], setting["temperature"])
            found.setdefault(place, {}).setdefault(run["name"], []).append(setting)
    return found


def _place(place: Place) -> str:
    return f"{place[0]}, T={place[1]:g}"


def _acceptance(groups: Sequence[Group], of: str) -> list[str]:
    told = "share of rounds that accept the draft there"
    speed = _speed_by_k(groups, of)
    return [
        _by_position(groups, "by_position", f"Accepted by position{of}", told),
        _by_position(groups, "by_position_conditional", f"Accepted, given reached{of}", "of the rounds that get there"),
        _tau_by_k(groups, of),
        *([speed] if speed else []),
    ]


def _by_position(groups: Sequence[Group], key: str, title: str, note: str) -> str:
    series = []
    for group in groups:
        rates = group.settings[-1]["exact"][key]
        label = f"{group.name}, K={group.settings[-1]['num_speculative_tokens']}"
        series.append(Series(name=label, x=range(1, len(rates) + 1), y=rates, colour=group.colour, marks=True))
    return _figure(title, note, series, lines(title, series, x="position in the draft", y="probability", whole_x=True))


@attrs.frozen(kw_only=True)
class DrafterRows:
    """The speculator or a baseline in one group; each row is (K, acceptance, speed or None)."""

    name: str
    colour: int
    line: str
    rows: Sequence[tuple[int, Values, Values | None]]


def _drafters(groups: Sequence[Group]) -> list[DrafterRows]:
    """Returns the speculators, then the baselines in the colours of their groups and other lines."""
    own, others = [], []
    for group in groups:
        rows: list[tuple[int, Values, Values | None]] = []
        baselines: dict[str, list[tuple[int, Values, Values | None]]] = {}
        for setting in group.settings:
            k, live = setting["num_speculative_tokens"], setting["live"]
            rows.append((k, setting["exact"], live["speed"] if live else None))
            for one in setting["baselines"]:
                baselines.setdefault(one["name"], []).append((k, one["acceptance"], one["speed"]))
        own.append(DrafterRows(name=group.name, colour=group.colour, line="solid", rows=rows))
        for index, (baseline, held) in enumerate(baselines.items()):
            label = baseline if len(groups) == 1 else f"{baseline}, {group.name}"
            line = "dotted" if index % 2 else "dashed"
            others.append(DrafterRows(name=label, colour=group.colour, line=line, rows=held))
    return [*own, *others]


def _tau_by_k(groups: Sequence[Group], of: str) -> str:
    series = [
        Series(
            name=drafter.name,
            x=[k for k, _, _ in drafter.rows],
            y=[acceptance["tau"] for _, acceptance, _ in drafter.rows],
            intervals=[acceptance["tau_interval"] for _, acceptance, _ in drafter.rows],
            colour=drafter.colour,
            line=drafter.line,
            marks=True,
        )
        for drafter in _drafters(groups)
    ]
    plot = lines(f"tau{of}", series, x="K, tokens drafted a round", y="tau", whole_x=True)
    return _figure(f"Tau by K{of}", "exact, by replay; bars are 95% intervals over prompts", series, plot)


def _speed_by_k(groups: Sequence[Group], of: str) -> str:
    """Returns the figure, "" where no speed was measured."""
    series = []
    for drafter in _drafters(groups):
        if known := [(k, speed["speed_up"]) for k, _, speed in drafter.rows if speed]:
            ks, values = zip(*known, strict=True)
            series.append(
                Series(name=drafter.name, x=ks, y=values, colour=drafter.colour, line=drafter.line, marks=True)
            )
    if not series:
        return ""
    note = "tokens a second against plain decoding: same device, engine, prompts, sampling"
    plot = lines(f"speed{of}", series, x="K, tokens drafted a round", y="speed-up", whole_x=True, level=1.0)
    return _figure(f"Speed-up by K{of}", note, series, plot)


def _by_category(place: str, held: Mapping[str, Sequence[Values]], runs: Sequence[Values]) -> list[str]:
    """Returns the figure of one suite and temperature at each run's largest K; none where there are no categories."""
    largest = {name: settings[-1] for name, settings in held.items()}
    labels = list(dict.fromkeys(label for setting in largest.values() for label in setting["by_category"]))
    if len(labels) < 2:
        return []
    series = []
    for index, name in enumerate(run["name"] for run in runs):
        if name not in largest:
            continue
        rows = largest[name]["by_category"]
        at = [row for row, label in enumerate(labels) if label in rows]
        taus, intervals = ([rows[labels[row]][key] for row in at] for key in ("tau", "tau_interval"))
        label = f"{name}, K={largest[name]['num_speculative_tokens']}"
        series.append(Series(name=label, x=at, y=taus, intervals=intervals, colour=index))
    plot = dots(f"category: {place}", labels, series, x="tau")
    return [_figure(f"Tau by category: {place}", "exact; bars are 95% intervals over prompts", series, plot)]


def _column(points: Sequence[Sequence[float]]) -> list[float]:
    return [value for _, value in points]


def _figure(title: str, note: str, series: Sequence[Series], plot: str) -> str:
    caption = f'<figcaption>{escape(title)}<span class="note">{escape(note)}</span></figcaption>'
    keys = "".join(
        f'<span style="color: var(--s{one.colour % COLOURS})"><i class={one.line}></i>{escape(one.name)}</span>'
        for one in series
    )
    named = plot.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1)
    return f'<figure>{caption}{named}<div class="keys">{keys}</div></figure>'
