"""The HTML report: complete, self-contained, honest about what is missing, the same for the same runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from math import nan
from pathlib import Path

import attrs
import pytest
from fake_run import PLACES, UPDATES, fake_run

pytest.importorskip("matplotlib", reason="pip install 'spec-recipes[report]'")

from speculators.errors import ArtifactError, SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.report import plots
from speculators.report.curves import POINTS, thinned
from speculators.report.figures import acceptance_figures
from speculators.report.gather import Report, gather
from speculators.report.html import page
from speculators.report.seeds import labels
from speculators.report.sheet import SHEET

PLOTS = ["Accepted by position", "Accepted, given reached", "Tau by K", "Speed-up by K", "Loss", "Exact tau during"]
PLOTS += ["Accuracy by depth", "Learning rate", "Gradient norm", "Tokens per second"]


@pytest.fixture(scope="module")
def facts(tiny_verifier: Path) -> VerifierFacts:
    return VerifierFacts.read(tiny_verifier / "config.json")


@pytest.fixture
def run(tmp_path: Path, facts: VerifierFacts) -> Path:
    """A run with one suite and temperature."""
    return fake_run(tmp_path, facts, places=PLACES[:1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, facts: VerifierFacts) -> list[Path]:
    """Two runs that differ in the learning rate; read only."""
    home = tmp_path_factory.mktemp("runs")
    plain = fake_run(home, facts, places=PLACES[:2])
    return [plain, fake_run(home, facts, "schedule.optimizer.lr=5e-3", rate=0.64, places=PLACES[:2])]


@pytest.fixture(scope="module")
def both(runs: list[Path]) -> str:
    return page(gather(runs))


def missing(folder: Path) -> list[str]:
    """The missing parts that the report lists; the page is made all the same and shows them."""
    report = gather([folder])
    text = page(report)
    lines = list(report.runs[0].missing)
    assert all(escape(line) in text for line in lines)
    return lines


def test_a_whole_run_lacks_nothing(tmp_path: Path, facts: VerifierFacts) -> None:
    """The page has every plot, the numbers with their definition, stages with times, plan, lock and recipe."""
    report = gather([fake_run(tmp_path, facts)])
    assert report.runs[0].missing == ()
    text = page(report)
    captions = re.findall(r"<figcaption>([^<]*)", text)
    assert [title for title in PLOTS if not any(caption.startswith(title) for caption in captions)] == []
    assert sum(caption.startswith("Tau by category") for caption in captions) == 3
    assert "2.458 (2.36 to 2.56)" in text
    assert "tau = tokens emitted a round" in text
    assert f"trained, {UPDATES} updates; exported from update 810; tau there 2.100" in text
    assert text.count("<td>129 to 256</td>") == len(report.runs[0].settings) == text.count("<td>65 to 128</td>")
    for phrase in ("1h 20m", "target_layer_ids", "packages.torch", "schedule.optimizer.lr", "[schedule]"):
        assert phrase in text


def test_the_page_needs_nothing_from_elsewhere(both: str) -> None:
    """It has no script and no address to fetch, and its policy makes a browser refuse both."""
    assert "<script" not in both
    assert "default-src 'none'" in both
    assert re.findall(r"""(?:src|href|action)=["']?(?!#|data:,)[^"'> ]+|url\((?!#)|@import""", both) == []


def test_text_of_plots_is_text_and_colours_are_the_pages(both: str) -> None:
    """Light and dark define the same colours, and no plot has one of its own."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", both, flags=re.DOTALL))
    assert ">update</text>" in drawn
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []
    light, dark = SHEET.split("prefers-color-scheme: dark")
    # The ground of a box is one of the other colours.
    names = set(re.findall(r"var\((--\w+)\)", both)) - {"--ground"}
    assert {"--ink", "--s0", "--s1", "--b0", "--grid", "--shade"} <= names
    for sheet in (light, dark):
        assert names <= set(re.findall(r"(--\w+):", sheet))


def test_nothing_on_the_page_has_the_same_id_twice(both: str) -> None:
    """Plots on one page would otherwise be clipped by each other's frames; what is referred to is there."""
    ids = Counter(re.findall(r' id="([^"]+)"', both))
    assert [name for name, count in ids.items() if count > 1] == []
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', both)) <= set(ids)


def test_the_same_runs_give_the_same_bytes(runs: list[Path], both: str) -> None:
    """The page contains no date and no random name."""
    assert page(gather(runs)) == both


def test_several_runs_stand_side_by_side_with_their_differences(runs: list[Path], both: str) -> None:
    """Curves share plots, values stand in columns with differences marked, and each run is compared with the first."""
    assert re.search(r"<tr class=differs><td>schedule.optimizer.lr</td><td>0.001</td><td>0.005</td>", both)
    assert f"<h3>{runs[0].name} → {runs[1].name}</h3>" in both
    assert "train runs again" in both
    assert "<b>results are comparable</b>" in both
    assert "talk, K=7, T=0: tau 2.458 -&gt; 2.700" in both
    (loss,) = re.findall(r"<figcaption>Loss.*?</figure>", both, flags=re.DOTALL)
    assert all(f"</i>lr={rate}<" in loss for rate in ("0.001", "0.005"))


def test_the_difference_comes_first(runs: list[Path], both: str) -> None:
    """Above the numbers, without what has no effect; each run is introduced with its name and what distinguishes it."""
    assert re.findall(r"<section id=\"(\w+)\"", both)[:2] == ["difference", "acceptance"]
    (section,) = re.findall(r"<section id=\"difference\">(.*?)</section>", both, flags=re.DOTALL)
    assert re.findall(r"<tr><td>([\w.]+)</td>", section) == ["schedule.optimizer.lr"]
    assert f"<b>lr=0.005</b> ({runs[1].name}): trained" in both


def test_a_baseline_has_one_line_in_its_own_colour(both: str) -> None:
    """The same answers give it the same drafts in every run; no run has its colour."""
    for title in ("Tau by K: talk, T=0", "Speed-up by K: talk, T=0"):
        (figure,) = re.findall(rf"<figcaption>{title}.*?</figure>", both, flags=re.DOTALL)
        assert re.findall(r'<span style="color: var\(--(\w+)\)"><i class=\w+></i>([^<]*)', figure) == [
            ("s0", "lr=0.001"),
            ("s1", "lr=0.005"),
            ("b0", "ngram"),
        ]


def test_a_baseline_that_differs_between_temperatures_has_lines_of_two_kinds(run: Path) -> None:
    """In one colour, each named by its suite and temperature."""
    (report,) = gather([run]).runs
    hot = [
        attrs.evolve(each, temperature=1.0, baselines=(attrs.evolve(each.baselines[0], acceptance=each.exact),))
        for each in report.settings
    ]
    figures = acceptance_figures([attrs.evolve(report, settings=(*report.settings, *hot))])
    (tau,) = [figure for figure in figures if "<figcaption>Tau by K<" in figure]
    kinds = re.findall(r'<span style="color: var\(--(b\d)\)"><i class=(\w+)></i>([^<]*)', tau)
    assert kinds == [("b0", "dashed", "ngram, talk, T=0"), ("b0", "dotted", "ngram, talk, T=1")]


def test_runs_that_differ_in_the_seed_have_mean_and_spread(tmp_path: Path, facts: VerifierFacts) -> None:
    """Tau and speed-up of each setting, over all runs that differ in nothing else."""
    rates = {0: 0.60, 1: 0.62, 2: 0.59}
    seeds = [fake_run(tmp_path, facts, f"seed={seed}", rate=rate, places=PLACES[:1]) for seed, rate in rates.items()]
    other = fake_run(tmp_path, facts, "schedule.optimizer.lr=5e-3", rate=0.9, places=PLACES[:1])
    text = page(gather([*seeds, other]))
    # 1 + r + r^2 + r^3 for the three rates: 2.176, 2.243, 2.143.
    assert "<td>talk</td><td>0</td><td>3</td><td>3</td><td>2.187 ± 0.051</td><td>2.143 to 2.243</td>" in text
    assert "Over seeds" not in page(gather([seeds[0], other]))


def test_axes_of_probabilities_begin_at_0(both: str) -> None:
    """Otherwise a level line fills the plot with noise."""
    for title in ("Accepted by position: talk, T=0", "Accepted, given reached: talk, T=0", "Accuracy by depth"):
        (figure,) = re.findall(rf"<figcaption>{title}.*?</figure>", both, flags=re.DOTALL)
        assert ">0.0</text>" in figure


def test_long_labels_are_whole() -> None:
    """The name of a category is broken into lines, not cut off."""
    label = "questions about the history of cooking"
    drawn = plots.dots("rows", [label], [plots.Series(name="one", x=[0], y=[1.5])], x="tau")
    words = re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", drawn)
    assert set(label.split()) <= set(" ".join(words).split())
    assert "…" not in drawn


def test_updates_are_whole_numbers() -> None:
    """A short training has no update 2.5."""
    drawn = plots.lines("short", [plots.Series(name="one", x=[1, 2, 3, 4], y=[4, 3, 2, 1])], x="update", y="loss")
    assert not re.findall(r">\d+\.5</text>", drawn.split("matplotlib.axis_2")[0].split(">update<")[0])


@pytest.mark.parametrize(
    ("recipes", "expected"),
    [
        ([{"seed": 0, "schedule.lr": 1}, {"seed": 1, "schedule.lr": 1}], ["seed=0", "seed=1"]),
        ([{"seed": 0, "schedule.lr": 1}, {"seed": 1, "schedule.lr": 2}], ["seed=0, lr=1", "seed=1, lr=2"]),
        ([{"a.lr": 1, "b.lr": 1}, {"a.lr": 2, "b.lr": 2}], ["a.lr=1, b.lr=1", "a.lr=2, b.lr=2"]),
        ([{"name": "one", "x": 1}, {"name": "two", "x": 2}], ["one", "two"]),
        ([{"x": 1}, {"x": 1}], ["A", "B"]),
        ([{"x": 1}, {}], ["A", "B"]),
        ([dict.fromkeys("wxyz", 1), dict.fromkeys("wxyz", 2)], ["A", "B"]),
        ([{"x": 1}], ["A"]),
    ],
)
def test_a_label_is_what_differs(recipes: list[dict[str, object]], expected: list[str]) -> None:
    """Legends name the values that differ, or the recipes; the runs where that would be unclear or long."""
    assert labels(["A", "B"][: len(recipes)], recipes) == expected


def test_what_files_say_is_text(tmp_path: Path, facts: VerifierFacts) -> None:
    """A category, an event or a recipe cannot add elements to the page."""
    run = fake_run(tmp_path, facts, places=PLACES[:1])
    evil = "<script>alert(1)</script>"
    for file in (run / "plan.json", run / "lock.json", run / "bench" / "0.json", run / "events.jsonl"):
        content = (
            file.read_text()
            .replace("is done", evil)
            .replace('"chat"', json.dumps(evil))
            .replace('"2.13"', json.dumps(evil))
        )
        file.write_text(content.replace("Every stage in", evil).replace('"ngram"', json.dumps(evil)))
    (run / "recipe.toml").write_text(evil)
    text = page(gather([run]))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8


def test_a_run_that_was_interrupted_is_reported_as_such(run: Path) -> None:
    """The report says how far it came and how to go on; a torn last line of the log is skipped."""
    (run / "train.json").unlink()
    (run / "bench" / "0.json").unlink()
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join(lines[:100]) + '\n{"event": "StepEv')
    assert missing(run) == [
        "training stopped after update 95 of 900: spec run with its recipe resumes from the last checkpoint",
        "there is no benchmark",
    ]


def test_a_resumed_run_counts_each_update_once(run: Path) -> None:
    """The last record of an update counts, and updates stand in order."""
    file = run / "events.jsonl"
    again = [{"event": "EvalEvent", "step": 90, "tau": 1.25}, {"event": "EvalEvent", "step": 30, "tau": 1.0}]
    file.write_text(file.read_text() + "".join(json.dumps(event) + "\n" for event in again))
    (reported,) = gather([run]).runs
    assert reported.curves.tau[:2] == [(30, 1.0), (90, 1.25)]
    assert len(reported.curves.tau) == 11


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("plan.json", "{", "plan.json is missing or damaged"),
        ("lock.json", None, "lock.json is missing or damaged"),
        ("events.jsonl", None, "events.jsonl is missing or empty"),
        ("bench/0.json", "[1", "bench/0.json is left out: it is damaged"),
        ("bench/0.json", '{"format": 1}', "bench/0.json is left out: it is of format 1"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_listed(run: Path, file: str, content: str | None, message: str) -> None:
    """The rest of the page is made all the same."""
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    assert any(line.startswith(message) for line in missing(run))


def test_a_damaged_plan_leaves_out_the_difference(run: Path, runs: list[Path]) -> None:
    """The page says why."""
    (run / "plan.json").write_text("{}")
    assert "cannot be compared: " in page(gather([runs[0], run]))


def test_a_setting_is_that_of_the_newest_benchmark(run: Path) -> None:
    """Older files add the settings that only they have; the report lists settings without a live decode."""
    first = run / "bench" / "0.json"
    benchmark = json.loads(first.read_text())
    settings = [setting for setting in benchmark["settings"] if setting["num_speculative_tokens"] == 3][:1]
    settings[0]["exact"]["tau"], settings[0]["live"] = 1.234, None
    newer = run / "bench" / "1.json"
    newer.write_text(json.dumps({**benchmark, "settings": settings}))
    report = gather([run])
    (reported,) = report.runs
    assert len(reported.settings) == len(benchmark["settings"])
    assert reported.settings[0].exact.tau == 1.234
    assert reported.missing == ("no live decode, and so no speed-up, at K=3",)
    assert "not asked" in page(report)


def test_runs_of_one_recipe_in_two_places_have_different_names(tmp_path: Path, facts: VerifierFacts) -> None:
    """Their folders have the same name, so paths distinguish them; a run that is named twice appears once."""
    one, other = (fake_run(tmp_path / place, facts, places=PLACES[:1]) for place in ("here", "there"))
    report = gather([one, other, one])
    assert [run.name for run in report.runs] == [str(one), str(other)]
    (diff,) = report.diffs
    assert (diff.a, diff.b, diff.comparison.changes) == (str(one), str(other), ())


def test_a_run_has_one_colour_on_the_page(tmp_path: Path, facts: VerifierFacts) -> None:
    """It keeps the colour in plots of what an earlier run did not measure."""
    first = fake_run(tmp_path, facts, places=PLACES[:1])
    second = fake_run(tmp_path, facts, "schedule.optimizer.lr=5e-3", places=PLACES[2:])
    text = page(gather([first, second]))
    keys = set(re.findall(r'<span style="color: (var\(--s\d\))"><i class=solid></i>lr=0.005', text))
    assert keys == {"var(--s1)"}


def test_a_long_curve_is_drawn_from_means_of_equal_parts() -> None:
    """The means keep the ends and the mean of the curve."""
    points = [(float(step), float(step % 7)) for step in range(1, 10_001)]
    short = thinned(points, POINTS)
    assert len(short) == POINTS
    assert sum(y for _, y in short) / POINTS == pytest.approx(sum(y for _, y in points) / len(points))
    assert (short[0][0], short[-1][0]) == (13.0, 9988.0)


def test_a_folder_that_is_no_run_is_one_error(tmp_path: Path) -> None:
    """The error names the folder, with the command that lists runs."""
    with pytest.raises(ArtifactError, match="not a run: it has neither plan"):
        gather([tmp_path])
    with pytest.raises(ArtifactError, match="no such folder"):
        gather([tmp_path / "nowhere"])


def test_without_matplotlib_the_error_names_the_extra(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before any work."""
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpeculatorsError, match=r"pip install 'spec-recipes\[report\]'"):
        page(Report(runs=(), diffs=()))


def test_a_series_of_every_kind_is_drawn() -> None:
    """NaN leaves a gap, and more series than colours repeat the colours."""
    one = plots.Series(name="one", x=[1, 3, 5], y=[1.5, nan, 1.7], intervals=[(1.4, 1.6), (nan, nan), (nan, nan)])
    colours = map(plots.run_colour, range(plots.COLOURS + 1))
    many = [attrs.evolve(one, colour=colour, line="dotted", marks=True) for colour in colours]
    drawn = plots.lines("many", many, x="K", y="tau", at_points=True, level=1.0)
    assert drawn.startswith("<svg viewBox=")
    assert "var(--s7)" in drawn
    assert "a$b" in plots.dots("rows", ["a$b"], [plots.Series(name="one", x=[0], y=[1.5], intervals=[(1, 2)])], x="tau")
