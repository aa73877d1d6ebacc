"""The plots of a report, each as an HTML figure with its caption and legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import attrs

from speculators.bench.result import Acceptance, Setting
from speculators.bench.speed import Speed
from speculators.report.gather import RunReport
from speculators.report.plots import COLOURS, Series, dots, lines

# Suite and temperature.
Place = tuple[str, float]
# K, acceptance, and speed where it was measured.
KRow = tuple[int, Acceptance, Speed | None]


def training_figures(runs: Sequence[RunReport]) -> list[str]:
    """Plots loss and exact acceptance length over the updates, all runs in one plot."""
    settings = "; ".join(dict.fromkeys(run.tau_setting for run in runs if run.tau_setting))
    loss_note = "mean over the supervised tokens of an update"
    tau_note = f"{settings}; the held-out suite by replay" if settings else loss_note
    figures = []
    for key, title, axis, note in (
        ("loss", "Loss", "loss", loss_note),
        ("tau", "Exact tau during training", "tau", tau_note),
    ):
        series = []
        for colour, run in enumerate(runs):
            if curve := (run.loss if key == "loss" else run.tau):
                x, y = zip(*curve, strict=True)
                series.append(Series(name=run.name, x=x, y=y, colour=colour, marks=key == "tau"))
        if series:
            figures.append(_figure(title, note, series, lines(key, series, x="update", y=axis)))
    return figures


def acceptance_figures(runs: Sequence[RunReport]) -> list[str]:
    """Plots acceptance by position, tau and speed-up by K, and tau by category, as far as they were measured.

    The settings of a single run share their plots; with several runs each suite and temperature has its own.
    """
    places = settings_by_place(runs)
    # A run keeps its colour over the whole page, also in plots of what an earlier run did not measure.
    colours = {run.name: index for index, run in enumerate(runs)}
    figures: list[str] = []
    if len(runs) > 1:
        for place, by_run in places.items():
            groups = [Group(name=name, colour=colours[name], settings=settings) for name, settings in by_run.items()]
            figures += _acceptance(groups, f": {_place_text(place)}" if len(places) > 1 else "")
    elif places:
        alone = [(place, settings) for place, by_run in places.items() for settings in by_run.values()]
        groups = [
            Group(name=_place_text(place), colour=index, settings=settings)
            for index, (place, settings) in enumerate(alone)
        ]
        figures += _acceptance(groups, "")
    by_category = [_by_category(_place_text(place), by_run, runs) for place, by_run in places.items()]
    return figures + [figure for figure in by_category if figure]


@attrs.frozen(kw_only=True)
class Group:
    """The settings behind one line of a plot: one run, suite and temperature, K rising."""

    name: str
    colour: int
    settings: Sequence[Setting]


def settings_by_place(runs: Sequence[RunReport]) -> dict[Place, dict[str, list[Setting]]]:
    """Groups settings by (suite, T) and then by run, K rising; runs without settings are left out."""
    places: dict[Place, dict[str, list[Setting]]] = {}
    for run in runs:
        for setting in sorted(run.settings, key=lambda setting: setting.num_speculative_tokens):
            place = (setting.suite, setting.temperature)
            places.setdefault(place, {}).setdefault(run.name, []).append(setting)
    return places


def _place_text(place: Place) -> str:
    return f"{place[0]}, T={place[1]:g}"


def _acceptance(groups: Sequence[Group], suffix: str) -> list[str]:
    reached = [group.settings[-1].exact.by_position for group in groups]
    given_reached = [group.settings[-1].exact.by_position_conditional for group in groups]
    speed = _speed_by_k(groups, suffix)
    return [
        _by_position(groups, reached, f"Accepted by position{suffix}", "share of rounds that accept the draft there"),
        _by_position(groups, given_reached, f"Accepted, given reached{suffix}", "of the rounds that get there"),
        _tau_by_k(groups, suffix),
        *([speed] if speed else []),
    ]


def _by_position(groups: Sequence[Group], rates: Sequence[Sequence[float]], title: str, note: str) -> str:
    series = [
        Series(
            name=f"{group.name}, K={group.settings[-1].num_speculative_tokens}",
            x=range(1, len(values) + 1),
            y=values,
            colour=group.colour,
            marks=True,
        )
        for group, values in zip(groups, rates, strict=True)
    ]
    return _figure(title, note, series, lines(title, series, x="position in the draft", y="probability", whole_x=True))


@attrs.frozen(kw_only=True)
class DrafterRows:
    """The speculator or a baseline in one group."""

    name: str
    colour: int
    line: str
    rows: Sequence[KRow]


def _drafters(groups: Sequence[Group]) -> list[DrafterRows]:
    """Lists the speculators, then the baselines in the colours of their groups but with other lines."""
    speculators, others = [], []
    for group in groups:
        rows: list[KRow] = []
        baselines: dict[str, list[KRow]] = {}
        for setting in group.settings:
            k = setting.num_speculative_tokens
            rows.append((k, setting.exact, setting.live.speed if setting.live else None))
            for one in setting.baselines:
                baselines.setdefault(one.name, []).append((k, one.acceptance, one.speed))
        speculators.append(DrafterRows(name=group.name, colour=group.colour, line="solid", rows=rows))
        for index, (baseline, baseline_rows) in enumerate(baselines.items()):
            name = baseline if len(groups) == 1 else f"{baseline}, {group.name}"
            line = "dotted" if index % 2 else "dashed"
            others.append(DrafterRows(name=name, colour=group.colour, line=line, rows=baseline_rows))
    return [*speculators, *others]


def _tau_by_k(groups: Sequence[Group], suffix: str) -> str:
    series = [
        Series(
            name=drafter.name,
            x=[k for k, _, _ in drafter.rows],
            y=[acceptance.tau for _, acceptance, _ in drafter.rows],
            intervals=[acceptance.tau_interval for _, acceptance, _ in drafter.rows],
            colour=drafter.colour,
            line=drafter.line,
            marks=True,
        )
        for drafter in _drafters(groups)
    ]
    plot = lines(f"tau{suffix}", series, x="K, tokens drafted per round", y="tau", whole_x=True)
    return _figure(f"Tau by K{suffix}", "exact, by replay; bars are 95% intervals over prompts", series, plot)


def _speed_by_k(groups: Sequence[Group], suffix: str) -> str:
    """Makes the figure; "" where no speed was measured."""
    series = []
    for drafter in _drafters(groups):
        if timed := [(k, speed.speed_up) for k, _, speed in drafter.rows if speed]:
            ks, values = zip(*timed, strict=True)
            series.append(
                Series(name=drafter.name, x=ks, y=values, colour=drafter.colour, line=drafter.line, marks=True)
            )
    if not series:
        return ""
    note = "tokens per second against plain decoding: same device, engine, prompts, sampling"
    plot = lines(f"speed{suffix}", series, x="K, tokens drafted per round", y="speed-up", whole_x=True, level=1.0)
    return _figure(f"Speed-up by K{suffix}", note, series, plot)


def _by_category(place: str, by_run: Mapping[str, Sequence[Setting]], runs: Sequence[RunReport]) -> str:
    """Makes the figure of one suite and temperature at each run's largest K; "" where there are no categories."""
    largest = {name: settings[-1] for name, settings in by_run.items()}
    labels = list(dict.fromkeys(label for setting in largest.values() for label in setting.by_category))
    if len(labels) < 2:
        return ""
    series = []
    for colour, name in enumerate(run.name for run in runs):
        if name not in largest:
            continue
        categories = largest[name].by_category
        rows = [(row, categories[label]) for row, label in enumerate(labels) if label in categories]
        series.append(
            Series(
                name=f"{name}, K={largest[name].num_speculative_tokens}",
                x=[row for row, _ in rows],
                y=[acceptance.tau for _, acceptance in rows],
                intervals=[acceptance.tau_interval for _, acceptance in rows],
                colour=colour,
            )
        )
    plot = dots(f"category: {place}", labels, series, x="tau")
    return _figure(f"Tau by category: {place}", "exact; bars are 95% intervals over prompts", series, plot)


def _figure(title: str, note: str, series: Sequence[Series], plot: str) -> str:
    caption = f'<figcaption>{escape(title)}<span class="note">{escape(note)}</span></figcaption>'
    keys = "".join(
        f'<span style="color: var(--s{one.colour % COLOURS})"><i class={one.line}></i>{escape(one.name)}</span>'
        for one in series
    )
    named = plot.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1)
    return f'<figure>{caption}{named}<div class="keys">{keys}</div></figure>'
