"""The plots of a report, each as an HTML figure with its caption and legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import attrs

from speculators.bench.result import Acceptance, Setting
from speculators.bench.speed import Speed
from speculators.report.curves import Points
from speculators.report.gather import RunReport
from speculators.report.plots import Series, baseline_colour, dots, lines, run_colour

# Suite and temperature.
Place = tuple[str, float]
# K, acceptance, and speed where it was measured.
KRow = tuple[int, Acceptance, Speed | None]


def training_figures(runs: Sequence[RunReport]) -> list[str]:
    """Plots what runs logged over their updates, all runs in one plot."""
    settings = "; ".join(dict.fromkeys(run.tau_setting for run in runs if run.tau_setting))
    tau_note = f"{settings}; the held-out suite by replay" if settings else "the held-out suite by replay"
    figures = [
        _curves(runs, "loss", "Loss", "loss", "mean over the supervised tokens of an update"),
        _curves(runs, "tau", "Exact tau during training", "tau", tau_note),
        _accuracy(runs),
        _curves(runs, "learning_rate", "Learning rate", "learning rate", "of each update"),
        _curves(runs, "grad_norm", "Gradient norm", "norm", "of each update, before clipping"),
        _curves(runs, "tokens_per_second", "Tokens per second", "tokens/s", "of training, over all processes"),
    ]
    return [figure for figure in figures if figure]


def _curves(runs: Sequence[RunReport], name: str, title: str, axis: str, note: str) -> str:
    """Plots one curve of every run that logged it; "" where none did."""
    series = []
    for index, run in enumerate(runs):
        curve: Points = getattr(run.curves, name)
        if curve:
            x, y = zip(*curve, strict=True)
            colour = run_colour(index)
            series.append(Series(name=run.label, x=x, y=y, colour=colour, marks=name == "tau"))
    if not series:
        return ""
    from_zero = name not in ("loss", "tau")
    return _figure(title, note, series, lines(name, series, x="update", y=axis, from_zero=from_zero))


def _accuracy(runs: Sequence[RunReport]) -> str:
    """Plots accuracy at each depth of a single run, at the first and the last depth of several."""
    series = []
    for index, run in enumerate(runs):
        depths = list(run.curves.accuracy)
        for place, depth in enumerate(depths if len(runs) == 1 else dict.fromkeys((*depths[:1], *depths[-1:]))):
            x, y = zip(*run.curves.accuracy[depth], strict=True)
            alone = len(runs) == 1
            series.append(
                Series(
                    name=f"depth {depth}" if alone else f"{run.label}, depth {depth}",
                    x=x,
                    y=y,
                    colour=run_colour(place if alone else index),
                    line="dashed" if place and not alone else "solid",
                )
            )
    if not series:
        return ""
    plot = lines("accuracy", series, x="update", y="share of rows", from_zero=True)
    return _figure("Accuracy by depth", "rows whose drafts are right up to that depth", series, plot)


def acceptance_figures(runs: Sequence[RunReport]) -> list[str]:
    """Plots acceptance by position, tau and speed-up by K, and tau by category, as far as they were measured.

    The settings of a single run share their plots; with several runs each suite and temperature has its own.
    """
    places = runs_by_place(runs)
    # A run keeps its colour over the whole page, also in plots of what an earlier run did not measure.
    colours = {run.name: run_colour(index) for index, run in enumerate(runs)}
    short = {run.name: run.label for run in runs}
    figures: list[str] = []
    if len(runs) > 1:
        for place, by_run in places.items():
            groups = [
                Group(name=short[name], colour=colours[name], settings=settings) for name, settings in by_run.items()
            ]
            figures += _acceptance(groups, f": {_place_text(place)}" if len(places) > 1 else "")
    elif places:
        alone = [(place, settings) for place, by_run in places.items() for settings in by_run.values()]
        groups = [
            Group(name=_place_text(place), colour=run_colour(index), settings=settings)
            for index, (place, settings) in enumerate(alone)
        ]
        figures += _acceptance(groups, "")
    by_category = [_by_category(_place_text(place), by_run, runs) for place, by_run in places.items()]
    return figures + [figure for figure in by_category if figure]


@attrs.frozen(kw_only=True)
class Group:
    """The settings behind one line of a plot: one run, suite and temperature, K rising."""

    name: str
    colour: str
    settings: Sequence[Setting]


def runs_by_place(runs: Sequence[RunReport]) -> dict[Place, dict[str, list[Setting]]]:
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
    return _figure(
        title,
        note,
        series,
        lines(title, series, x="position in the draft", y="probability", at_points=True, from_zero=True),
    )


@attrs.frozen(kw_only=True)
class DrafterRows:
    """The speculator or a baseline in one group or more."""

    name: str
    colour: str
    line: str
    rows: Sequence[KRow]


def _drafters(groups: Sequence[Group]) -> list[DrafterRows]:
    """Lists the speculators, then the baselines, each once where it is the same in all groups."""
    speculators = [
        DrafterRows(
            name=group.name,
            colour=group.colour,
            line="solid",
            rows=[
                (each.num_speculative_tokens, each.exact, each.live.speed if each.live else None)
                for each in group.settings
            ],
        )
        for group in groups
    ]
    # By name and the acceptance at each K: the same answers give a baseline the same drafts, whatever was trained.
    same: dict[str, dict[object, list[tuple[Group, list[KRow]]]]] = {}
    for group in groups:
        for name, rows in _baselines(group).items():
            measured = tuple((k, acceptance.tau) for k, acceptance, _ in rows)
            same.setdefault(name, {}).setdefault(measured, []).append((group, rows))
    others = []
    for index, (name, variants) in enumerate(same.items()):
        for place, members in enumerate(variants.values()):
            owner = "" if len(variants) == 1 else f", {', '.join(group.name for group, _ in members)}"
            line = "dotted" if place % 2 else "dashed"
            # Times differ from run to run; the first stands for all.
            rows = members[0][1]
            others.append(DrafterRows(name=name + owner, colour=baseline_colour(index), line=line, rows=rows))
    return [*speculators, *others]


def _baselines(group: Group) -> dict[str, list[KRow]]:
    rows: dict[str, list[KRow]] = {}
    for setting in group.settings:
        for one in setting.baselines:
            rows.setdefault(one.name, []).append((setting.num_speculative_tokens, one.acceptance, one.speed))
    return rows


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
    plot = lines(f"tau{suffix}", series, x="K, tokens drafted per round", y="tau", at_points=True)
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
    plot = lines(f"speed{suffix}", series, x="K, tokens drafted per round", y="speed-up", at_points=True, level=1.0)
    return _figure(f"Speed-up by K{suffix}", note, series, plot)


def _by_category(place: str, by_run: Mapping[str, Sequence[Setting]], runs: Sequence[RunReport]) -> str:
    """Makes the figure of one suite and temperature at each run's largest K; "" where there are no categories."""
    largest = {name: settings[-1] for name, settings in by_run.items()}
    labels = list(dict.fromkeys(label for setting in largest.values() for label in setting.by_category))
    if len(labels) < 2:
        return ""
    series = []
    for index, run in enumerate(runs):
        if run.name not in largest:
            continue
        setting = largest[run.name]
        categories = setting.by_category
        rows = [(row, categories[label]) for row, label in enumerate(labels) if label in categories]
        series.append(
            Series(
                name=("" if len(runs) == 1 else f"{run.label}, ") + f"K={setting.num_speculative_tokens}",
                x=[row for row, _ in rows],
                y=[acceptance.tau for _, acceptance in rows],
                intervals=[acceptance.tau_interval for _, acceptance in rows],
                colour=run_colour(index),
            )
        )
    plot = dots(f"category: {place}", labels, series, x="tau")
    return _figure(f"Tau by category: {place}", "exact; bars are 95% intervals over prompts", series, plot)


def _figure(title: str, note: str, series: Sequence[Series], plot: str) -> str:
    caption = f'<figcaption>{escape(title)}<span class="note">{escape(note)}</span></figcaption>'
    keys = "".join(
        f'<span style="color: var(--{one.colour})"><i class={one.line}></i>{escape(one.name)}</span>' for one in series
    )
    named = plot.replace('role="img"', f'role="img" aria-label="{escape(title)}"', 1)
    return f'<figure>{caption}{named}<div class="keys">{keys}</div></figure>'
