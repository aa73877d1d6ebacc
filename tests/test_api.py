"""The Python API: the README's example runs line by line, and each function does what its docstring says."""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest

import speculators
from speculators import (
    Run,
    Speculator,
    SpeculatorsError,
    decode,
    draft,
    load_recipe,
    load_speculator,
    make_plan,
    read_run,
    replay,
    run_recipe,
)
from speculators.bench.result import Setting
from speculators.events import ProgressEvent, StageEvent

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"^## In Python\n.*?^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
ASK = "Name three colours."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache that all tests of this file share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATORS_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def events() -> list[object]:
    """The events of this file's run."""
    return []


@pytest.fixture(scope="module")
def run(home: Path, events: list[object]) -> Run:
    """A shortened smoke run, made through the API."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECULATORS_CACHE", str(home / "cache"))
        return run_recipe(load_recipe("smoke", {"schedule.max_steps": 4}), runs=home / "runs", listen=events.append)


@pytest.fixture(scope="module")
def speculator(run: Run, home: Path) -> Speculator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECULATORS_CACHE", str(home / "cache"))
        return load_speculator(run.folder)


def test_every_line_of_the_readmes_example_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The ten lines work unchanged; the run they make is the run of this file, which is already on disk."""
    assert EXAMPLE is not None
    lines = [line for line in EXAMPLE[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    names: dict[str, object] = {}
    for line in lines:
        exec(line, names)
    assert names["run"].settings == run.settings
    printed = capsys.readouterr().out
    assert "'trainable'" in printed
    assert "speed_up" in printed


def test_overrides_are_values_and_none_drops_one() -> None:
    """Numbers, strings, lists and tables are taken as they are; a value that a recipe refuses is refused here too."""
    overrides = {
        "schedule.optimizer.lr": 1e-05,
        "benchmark.num_speculative_tokens": [2],
        "algorithm.loss": {"kl_div": 0.5, "ce": 0.5},
        "schedule.max_steps": None,
        "summary": 'says "x"',
    }
    recipe = load_recipe("smoke", overrides)
    assert recipe.schedule.optimizer.lr == 1e-05
    assert recipe.benchmark.num_speculative_tokens == (2,)
    assert recipe.algorithm.config.loss == {"kl_div": 0.5, "ce": 0.5}
    assert recipe.schedule.max_steps is None
    assert recipe.summary == 'says "x"'
    with pytest.raises(SpeculatorsError, match="did you mean 'lr'"):
        load_recipe("smoke", {"schedule.optimizer.lrr": 1.0})


def test_a_plan_counts_parameters_and_names_the_run(run: Run) -> None:
    """The plan of the recipe belongs to the run that the recipe made."""
    plan = make_plan(load_recipe("smoke", {"schedule.max_steps": 4}))
    assert plan.parameters["trainable"] > 0
    assert plan.run_name == run.folder.name


def test_events_go_to_the_callback(events: list[object], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A listener gets every event, and then nothing is printed."""
    assert {event.stage for event in events if isinstance(event, StageEvent)} >= {
        "prepare",
        "capture",
        "train",
        "bench",
    }
    assert any(isinstance(event, ProgressEvent) for event in events)
    run_recipe(load_recipe("smoke", {"schedule.max_steps": 4}), runs=run.folder.parent, listen=lambda event: None)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_without_a_callback_progress_is_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The view is the same as on the command line."""
    run_recipe(load_recipe("smoke", {"schedule.max_steps": 4}), runs=run.folder.parent)
    assert "train already done" in capsys.readouterr().err


def test_a_run_reads_as_typed_values(run: Run) -> None:
    """Settings are classes, and a table has a row for each of them."""
    assert all(isinstance(setting, Setting) for setting in run.settings)
    assert [setting.num_speculative_tokens for setting in run.settings] == [1, 3]
    assert read_run(str(run.folder)) == run
    assert (run.speculator / "model.safetensors").is_file()
    with pytest.raises(SpeculatorsError, match=r"plan\.json"):
        read_run(run.folder.parent)


def test_a_run_as_a_data_frame(run: Run) -> None:
    """The table has a row for each drafter, suite, temperature and K."""
    pytest.importorskip("pandas")
    frame = run.to_pandas()
    own = frame[frame["drafter"] == "speculator"]
    assert list(own["num_speculative_tokens"]) == [1, 3]
    assert list(own["tau"]) == [setting.exact.tau for setting in run.settings]
    assert len(frame) == sum(1 + len(setting.baselines) for setting in run.settings)


def test_a_data_frame_without_pandas_is_a_plain_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SpeculatorsError, match="pip install pandas"):
        run.to_pandas()


def test_decoding_is_lossless_and_replay_predicts_it(speculator: Speculator) -> None:
    """With and without drafts the answer is the same; replay gives the acceptance length of the live decode."""
    drafted, plain = (decode(speculator, ASK, max_new_tokens=24, num_speculative_tokens=k) for k in (3, 0))
    assert drafted.decoded.tokens == plain.decoded.tokens
    assert drafted.text == plain.text
    assert plain.tau == 1.0
    exact = replay(speculator, [ASK], max_new_tokens=24, num_speculative_tokens=3)
    assert math.isclose(exact.tau, drafted.tau)


def test_a_draft_is_the_first_round_of_a_decode(speculator: Speculator) -> None:
    """The draft follows the verifier's first token and begins with the tokens that the first round accepted."""
    first = draft(speculator, ASK, num_speculative_tokens=3)
    decoded = decode(speculator, ASK, max_new_tokens=24, num_speculative_tokens=3).decoded
    assert len(first.tokens) == decoded.rounds[0].drafted
    assert first.after == decoded.tokens[0]
    accepted = decoded.rounds[0].accepted
    assert first.tokens[:accepted] == decoded.tokens[1 : 1 + accepted]


def test_conversations_are_prompts_too(speculator: Speculator) -> None:
    """A list of messages is rendered as a whole; a string is one user's turn."""
    chat = [{"role": "user", "content": ASK}]
    assert speculator.tokens(chat).tolist() == speculator.tokens(ASK).tolist()
    longer = [*chat, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "More."}]
    assert len(speculator.tokens(longer)) > len(speculator.tokens(ASK))


def test_a_k_beyond_the_algorithm_is_refused(speculator: Speculator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is raised; silently drafting fewer tokens would mislead."""
    monkeypatch.setattr(type(speculator.model.config), "max_drafts", lambda config: (2, "ttt_steps"))
    with pytest.raises(SpeculatorsError, match="num_speculative_tokens: "):
        decode(speculator, ASK, num_speculative_tokens=3)


def test_a_folder_without_a_speculator_is_an_error(tmp_path: Path) -> None:
    """The error names the folder."""
    with pytest.raises(SpeculatorsError, match="neither a run with a speculator nor a speculator"):
        load_speculator(tmp_path)


def test_the_examples_in_docstrings_are_python() -> None:
    """An example that a reader copies from `help()` parses."""
    for name in speculators.__all__:
        _, heading, example = inspect.cleandoc(getattr(speculators, name).__doc__).partition("Example:\n")
        if heading:
            compile(textwrap.dedent(example), name, "exec")
