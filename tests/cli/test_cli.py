"""The command line starts quickly, shows no traceback, and has the exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import pstats
import subprocess
import sys
import types
from importlib import metadata, resources
from pathlib import Path

import pytest

from speculators import cli
from speculators.cli import main
from speculators.errors import TrainingError
from speculators.recipe.load import load_recipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA = str(FIXTURES / "llama-3.1-8b" / "config.json")

RECIPE = """\
format = 1
name = "mine"
version = "1.0.0"
[verifier]
model = "owner/model"
[data]
sources = [{ path = "rows.jsonl" }]
[algorithm]
name = "eagle3"
draft_vocab_size = 64
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "mine.toml").write_text(RECIPE)


def spec(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def new_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "speculators.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("validate", "mine.toml"), ("cp", "smoke", "copy.toml"), ("show", "smoke"), ("completion", "zsh")],
)
def test_light_verbs_import_neither_torch_nor_transformers_nor_rich(arguments: tuple[str, ...]) -> None:
    """A verb that only reads text does not load the libraries that take seconds."""
    done = new_process(*arguments)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "rich", "numpy", "datasets"})


def test_ls_imports_no_torch() -> None:
    """It prints tables and builds no model."""
    done = new_process("ls")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "torch" not in imported


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 10_000), (["validate", "quickstart"], 125_000)])
def test_help_and_validate_start_at_once(arguments: list[str], limit: int, tmp_path: Path) -> None:
    """Counts function calls, which are the same on a busy machine; `benchmarks/perf/start.py` measures the seconds."""
    profile = tmp_path / "calls"
    command = [sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "speculators.cli", *arguments]
    subprocess.run(command, capture_output=True, check=True)
    assert pstats.Stats(str(profile)).total_calls < limit


def test_version_prints_what_a_bug_report_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version, commit (of a checkout), Python, torch and the device; a broken torch does not hide the rest."""
    code, out, _ = spec(capsys, "--version")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"spec-recipes {metadata.version('spec-recipes')}")
    assert ("commit" in lines[0]) == (Path(cli.__file__).parents[1] / ".git").exists()
    assert f"torch {metadata.version('torch')}" in lines[2]
    assert lines[3].startswith("device: ")
    monkeypatch.setitem(sys.modules, "speculators.training.world", None)
    assert spec(capsys, "--version")[1].splitlines()[3].startswith("device: unknown (ModuleNotFoundError")


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """The list appears with and without --help, and each verb has its own help."""
    code, out, _ = spec(capsys)
    assert code == 0
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    for verb in cli.VERBS:
        code, out, _ = spec(capsys, verb, "--help")
        assert code == 0
        assert "--json" in out
        assert "--quiet" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["valdate"], "did you mean 'validate'?"),
        (["validate"], "RECIPE"),
        (["validate", "mine.toml", "--nonsense"], "--nonsense"),
        (["validate", "nowhere.toml"], "no such file"),
        (["validate", "mine.toml", "--set", "algorithm.ttt_steps=0"], "algorithm.ttt_steps: must be > 0, got 0"),
        (["validate", "mine.toml", "--set", "algorithm.decoder={sliding_window=-3}"], "sliding_window: must be > 0"),
        (["validate", "mine.toml", "--set", "format=2"], "format describes how the file is written"),
        (["validate", "mine.toml", "--set", f"seed={2**63}"], "seed: must be from 0 to 2^63 - 1"),
        (["validate", "mine.toml", "--set", 'verifier.model="tiny:99999999999999999999"'], "from 0 to 2^63 - 1"),
        (["validate", "mine.toml", "--set", "data.regenerate={seed=-1}"], "data.regenerate.seed: must be from 0"),
        (["validate", "mine.toml", "--set", "algorithm.num_layers=100000"], "must be at most 64, got 100000"),
        (["validate", "mine.toml", "--set", "algorithm.ttt_steps=100000"], "must be at most 64, got 100000"),
        (["validate", "mine.toml", "--set", "benchmark.num_speculative_tokens=[3000]"], "must be at most 64, got 3000"),
        (["validate", "mine.toml", "--set", "benchmark.max_new_tokens=2"], "must be at most max_new_tokens = 2"),
        (["validate", "mine.toml", "--set", "seed"], "write section.key=value"),
        (["plan", "mine.toml", "--verifier-config", LLAMA, "--set", "algorithm.draft_vocab_size=999_999"], "at most"),
        (["plan", "mine.toml", "--nproc", "x"], "--nproc"),
        (["plan", "mine.toml", "--nproc", "0"], "--nproc"),
        (["show", "mine.toml", "--why", "optimizer.lr"], "did you mean 'schedule.optimizer.lr'?"),
    ],
)
def test_a_mistake_exits_with_2_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    """Bad usage and bad recipes are reported on stderr without a traceback, and nothing is printed on stdout."""
    code, out, err = spec(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_all_problems_are_printed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Each begins with the word error, file and line."""
    Path("mine.toml").write_text(RECIPE.replace("draft_vocab_size = 64", 'draft_vocab_size = "64"\nttt_step = 1'))
    code, _, err = spec(capsys, "validate", "mine.toml")
    assert code == 2
    assert err.splitlines() == [
        'error: mine.toml:10: algorithm.draft_vocab_size: must be an integer, got "64"',
        "error: mine.toml:11: algorithm.ttt_step: unknown key 'ttt_step' (did you mean 'ttt_steps'?)",
    ]


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (TrainingError("the loss is not finite", hint="lower schedule.optimizer.lr"), 1, "lower schedule.optimizer.lr"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_exception_of_a_verb_becomes_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, text: str
) -> None:
    """A failure that the user can mend exits with 1, Ctrl-C with 130."""

    def fail(options: object) -> int:
        raise raised

    module = types.SimpleNamespace(__doc__="", add_arguments=lambda parser: None, run=fail)
    monkeypatch.setitem(sys.modules, "speculators.cli.made_up", module)
    monkeypatch.setitem(cli.VERBS, "made-up", "fails")
    got, _, err = spec(capsys, "made-up")
    assert got == code
    assert text in err


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    """`spec show smoke --resolved | head -1` exits with 0 and prints no error."""
    command = [sys.executable, "-m", "speculators.cli", "show", "smoke", "--resolved"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_shipped_facts_need_no_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The config.json of a pinned commit cannot change: the one that ships serves every verb that only plans."""

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("speculators.verifier.hub._snapshot", unreachable)
    code, out, err = spec(capsys, "validate", "eagle3_llama8b")
    assert (code, err) == (0, "")
    assert "checked against locks.json: meta-llama/Llama-3.1-8B-Instruct" in out
    assert spec(capsys, "plan", "eagle3_llama8b", "--json")[0] == 0
    assert "layer" in spec(capsys, "serve-states", "eagle3_llama8b", "--print")[1]


def test_validate_warns_of_another_models_config(capsys: pytest.CaptureFixture[str]) -> None:
    """As `spec plan` does: a check against the wrong file says nothing."""
    code, _, err = spec(capsys, "validate", "eagle3_qwen3_8b", "--verifier-config", LLAMA)
    assert "does not belong to Qwen/Qwen3-8B: model_type" in err, code


def test_validate_says_what_it_was_checked_against(capsys: pytest.CaptureFixture[str]) -> None:
    """With the verifier's config.json, its limits are checked too; without it, the note says so."""
    assert "not checked against" in spec(capsys, "validate", "mine.toml")[1]
    assert spec(capsys, "validate", "mine.toml", "--quiet") == (0, "", "")
    assert f"checked against {LLAMA}" in spec(capsys, "validate", "mine.toml", "--verifier-config", LLAMA)[1]
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text(Path(LLAMA).read_text())
    local = ["validate", "mine.toml", "--set", 'verifier.model="./model"']
    assert "checked against" in spec(capsys, *local)[1]
    assert spec(capsys, *local, "--set", "algorithm.draft_vocab_size=999_999")[0] == 2


def test_validate_takes_several_recipes_and_prints_all_problems_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One result for each recipe; a bad one does not hide the next."""
    Path("bad.toml").write_text(RECIPE.replace("[data]", "[date]"))
    code, out, err = spec(capsys, "validate", "bad.toml", "mine.toml", "--json")
    assert (code, err) == (2, "")
    bad, good = json.loads(out)
    assert (bad["ok"], good["ok"]) == (False, True)
    assert {problem["path"] for problem in bad["problems"]} == {"date", "data"}
    assert bad["problems"][0].keys() == {"file", "line", "path", "message", "hint"}


def test_show_prints_the_file_or_every_value_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    """`spec show` prints the recipe as written, resolved, one value, or as JSON."""
    assert spec(capsys, "show", "mine.toml")[1] == RECIPE
    resolved = spec(capsys, "show", "mine.toml", "--resolved", "--set", "seed=4")[1]
    lines = {line.split()[0]: line.split() for line in resolved.splitlines()}
    assert lines["seed"] == ["seed", "4", "--set"]
    assert lines["schedule.optimizer.lr"] == ["schedule.optimizer.lr", "0.0001", "default"]
    assert lines["verifier.model"] == ["verifier.model", '"owner/model"', "mine.toml:5"]
    why = json.loads(spec(capsys, "show", "mine.toml", "--why", "verifier.model", "--json")[1])
    assert why.keys() == {"verifier.model"}
    value = why["verifier.model"]
    assert (value["value"], value["origin"]) == ("owner/model", "mine.toml:5")
    assert (value["enters"], value["reruns"]) == (["verifier"], ["prepare", "train"])
    assert "hub id, local folder" in value["means"]


def test_show_why_explains_each_value_below_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    """It shows origin, comment, meaning and stages, on one line each."""
    Path("mine.toml").write_text(RECIPE + "[schedule]\noptimizer = { lr = 1e-3 }  # tried 3e-3\n")
    lines = spec(capsys, "show", "mine.toml", "--why", "schedule.optimizer")[1].splitlines()
    assert sum(" = " in line for line in lines) == 7
    start = lines.index("schedule.optimizer.lr = 0.001")
    rows = [line.split(maxsplit=1) for line in lines[start + 1 : start + 5]]
    assert [name for name, _ in rows] == ["from", "comment", "means", "enters"]
    assert [text.strip() for _, text in rows][:2] == ["mine.toml:12", "tried 3e-3"]
    assert rows[3][1].strip() == "train"
    assert "no stage's fingerprint" in spec(capsys, "show", "mine.toml", "--why", "summary")[1]
    text = spec(capsys, "show", "mine.toml", "--set", "schedule.optimizer.lr=2e-3", "--why", "schedule.optimizer.lr")[1]
    assert [line.split(maxsplit=1)[1].strip() for line in text.splitlines()[1:3]] == [
        "--set",
        "0.001, from mine.toml:12",
    ]


def test_show_why_of_nothing_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty key does not print the file as if there were no --why."""
    code, out, err = spec(capsys, "show", "mine.toml", "--why", "")
    assert (code, out) == (2, "")
    assert "--why: must be the path of a value or section" in err


def test_plan_prints_stages_and_derived_values(capsys: pytest.CaptureFixture[str]) -> None:
    """A config.json suffices; --json has the same values."""
    code, out, _ = spec(capsys, "plan", "mine.toml", "--verifier-config", LLAMA, "--nproc", "8")
    assert code == 0
    plan = json.loads(spec(capsys, "plan", "mine.toml", "--verifier-config", LLAMA, "--json")[1])
    assert [stage["name"] for stage in plan["stages"]] == ["verifier", "prepare", "train"]
    for stage in plan["stages"]:
        row = next(line for line in out.splitlines() if stage["fingerprint"][:8] in line.split())
        assert row.split()[0] == stage["name"], "a stage is one line"
        assert len(row.rstrip()) <= 80
    assert "2, 16, 29" in out
    assert "64 of 128,256 tokens" in out
    assert "32 rows of 2,048 tokens over 8" in out
    assert "131,072" in out
    assert "llama3" in out
    assert plan["run_name"] in out


def test_plan_without_network_says_how_to_plan_anyway(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable hub id is one error, which names --verifier-config."""
    from speculators.errors import VerifierError
    from speculators.verifier import sources

    def unreachable(*_: object, **__: object) -> None:
        raise VerifierError("owner/model cannot be reached")

    monkeypatch.setattr(sources, "fetch_facts", unreachable)
    code, _, err = spec(capsys, "plan", "mine.toml")
    assert code == 1
    assert "owner/model cannot be reached" in err
    assert "--verifier-config" in err


def test_ls_lists_recipes_algorithms_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are the folders of ./runs with a plan; they come first, then one line for each recipe."""
    assert "no runs here" in spec(capsys, "ls")[1]
    run = Path("runs/mine-12345678")
    run.mkdir(parents=True)
    (run / "plan.json").write_text('{"recipe": {"name": "mine"}}')
    Path("runs/notes").mkdir()
    code, out, _ = spec(capsys, "ls")
    assert code == 0
    assert out.index("mine-12345678") < out.index("quickstart")
    for recipe in ("quickstart", "eagle3_llama8b"):
        assert len([line for line in out.splitlines() if line.split()[:1] == [recipe]]) == 1
    assert "quickstart/K=5/T=0" not in out
    low, high = load_recipe("quickstart").expect["quickstart/K=5/T=0"].tau
    assert f"quickstart/K=5/T=0: tau {low:.2f} to {high:.2f}" in spec(capsys, "ls", "--long")[1]
    listed = json.loads(spec(capsys, "ls", "--json")[1])
    assert [each["name"] for each in listed["runs"]] == ["mine-12345678"]
    assert all(recipe["hardware"] and recipe["minutes"] and recipe["summary"] for recipe in listed["recipes"])


def test_cp_copies_once_and_never_over_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The copy validates where it is; an existing file is left alone."""
    code, out, err = spec(capsys, "cp", "eagle3_llama8b", "./copy.toml")
    assert (code, err) == (0, "")
    assert "spec run ./copy.toml" in out or "spec run copy.toml" in out
    assert spec(capsys, "validate", "./copy.toml")[0] == 0
    code, _, err = spec(capsys, "cp", "smoke", "./copy.toml")
    assert code == 2
    assert "exists" in err
    assert "eagle3_llama8b" in Path("copy.toml").read_text()
    assert spec(capsys, "cp", "smoke", "no/such/folder/x.toml")[0] == 1
    assert spec(capsys, "cp", "smoke", "x.txt")[0] == 2


def test_cp_leaves_bands_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A copy will be edited, so the bands of the original do not hold for it."""
    code, out, _ = spec(capsys, "cp", "quickstart_medusa", "./copy.toml")
    assert code == 0
    assert "[expect] was left out" in out
    original, copy = (
        resources.files("speculators.recipes").joinpath("quickstart_medusa.toml").read_text(),
        Path("copy.toml").read_text(),
    )
    assert copy == original[: original.index("\n[expect]")]
    assert json.loads(spec(capsys, "cp", "quickstart", "b.toml", "--json")[1])["left_out"] == ["expect"]
    assert "[expect]" not in spec(capsys, "cp", "smoke", "c.toml")[1]


def test_cp_warns_of_files_that_the_copy_does_not_find(capsys: pytest.CaptureFixture[str]) -> None:
    """In another folder, relative paths mean other files; the warning comes at once instead of at the run."""
    Path("deep").mkdir()
    code, _, err = spec(capsys, "cp", "mine.toml", "deep")
    assert code == 0
    assert "warning: deep/mine.toml:7: data.sources[0].path: " in err
    assert "/deep/rows.jsonl: no such file or folder" in err
