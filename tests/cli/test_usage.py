"""Usage: help with examples, errors that come at once and as JSON, and readers that leave early."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from command import Spec

from speculators import cli
from speculators.errors import TrainingError


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_ends_with_examples_that_parse(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example is a command line of that verb which its parser accepts, beside a verifier's config.json."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    parser = cli.verb_parser(verb)[1]
    assert cli.EXAMPLES[verb]
    for line in cli.EXAMPLES[verb]:
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("spec", verb)
        parser.parse_args(arguments)
        assert f"\n  {line}\n" in parser.format_help()
        assert len(line) <= 100


MISTAKES = [
    ["ls", "--rusn"],
    ["cp", "quickstrt", "x.toml"],
    ["validate", "quickstrt"],
    ["plan", "quickstrt"],
    ["plan", "quickstart", "--gpus", "8xH10"],
    ["data", "quickstrt"],
    ["serve-states", "quickstrt"],
    ["run", "quickstrt"],
    ["run", "quickstart", "--set", "seed=x"],
    ["run", "quickstart", "--name", "a/b"],
    ["try", "nowhere", "Name three colours."],
    ["init", "./model", "--out"],
    ["rm", "nowhere"],
    ["cache", "prune", "--recip"],
    ["bench", "nowhere"],
    ["bench", "nowhere", "--k", "0"],
    ["bench", "nowhere", "--ledger"],
    ["bench", "speculator", "--suite", "mtbench"],
    ["tune", "nowhere"],
    ["tune", "nowhere", "--endpoint", "http://127.0.0.1:1"],
    ["report", "nowhere"],
    ["ablate", "quickstrt"],
    ["ablate", "wrong.toml"],
    ["show", "quickstrt"],
    ["diff", "quickstrt", "quickstart"],
    ["doctor", "nowhere"],
    ["export", "nowhere", "--to", "vllm"],
    ["import", "nowhere", "--verifier", "tiny:0"],
    ["regenerate", "quickstrt", "rows.jsonl", "--out", "new.jsonl"],
    ["reproduce", "nowhere"],
    ["lock", "--check", "nowhere"],
    ["new-algorithm", "a b"],
    ["completion", "bsh"],
]


def test_a_typo_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """A wrong name or option of any verb exits with 2, and torch, which takes seconds, is not imported for it."""
    code = (
        "import json, sys\nfrom speculators.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    code = main(line)\n"
        "    assert code == 2, (line, code)\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    (tmp_path / "wrong.toml").write_text(
        "format = 1\nrecipe = 'smoke'\n[variants]\nlr = ['schedule.optimizer.lr=-1']\n"
    )
    (tmp_path / "speculator").mkdir()
    (tmp_path / "speculator" / "config.json").write_text("{}")
    command = [sys.executable, "-c", code, json.dumps(MISTAKES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(MISTAKES), done.stderr
    assert {line[0] for line in MISTAKES} == {*cli.VERBS}


@pytest.mark.parametrize("arguments", [["show", "quickstrt"], ["show", "quickstart", "--nonsense"], ["shwo"]])
def test_errors_are_json_where_the_result_would_be(fresh: Spec, arguments: list[str]) -> None:
    """With --json an error is one object on stdout, with what people read on stderr."""
    outcome = fresh(*arguments, "--json")
    assert outcome.code == 2
    (error,) = outcome.json["errors"]
    assert error.keys() == {"file", "line", "path", "message", "hint"}
    assert error["message"] in outcome.err


def test_each_problem_of_a_recipe_is_an_entry_with_its_line(fresh: Spec, tmp_path: Path) -> None:
    """Programs need not parse sentences to find the place of a fault."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text("format = 1\nname = 'x'\nversion = '1.0.0'\nextends = 'smoke'\nseed = 'a'\nepochs = 1\n")
    errors = fresh("plan", recipe, "--json").json["errors"]
    assert [(error["path"], error["line"]) for error in errors] == [("seed", 5), ("epochs", 6)]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A verb whose `run` a test sets."""
    module = types.SimpleNamespace(__doc__="", add_arguments=lambda parser: None, run=lambda options: 0)
    monkeypatch.setitem(sys.modules, "speculators.cli.made_up", module)
    monkeypatch.setitem(cli.VERBS, "made-up", "does something")
    return module


def test_a_failure_is_json_too(fresh: Spec, made_up: types.SimpleNamespace) -> None:
    """Errors that are not about a recipe have the same form: message and hint apart."""

    def fail(options: object) -> int:
        raise TrainingError("the loss is not finite", hint="lower schedule.optimizer.lr")

    made_up.run = fail
    outcome = fresh("made-up", "--json")
    assert outcome.code == 1
    assert outcome.json["errors"][0]["hint"] == "lower schedule.optimizer.lr"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_when_its_reader_leaves(
    monkeypatch: pytest.MonkeyPatch, made_up: types.SimpleNamespace, stream: str
) -> None:
    """`spec run RECIPE 2>&1 | head -1` neither ends the training nor changes the exit code."""
    done = []

    def work(options: object) -> int:
        from speculators.report.console import console

        for _ in range(3):
            print("update", file=getattr(sys, stream), flush=True)
            console(stderr=stream == "stderr").print("update")
            done.append("update")
        return 1

    reading, writing = os.pipe()
    os.close(reading)
    made_up.run = work
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, stream, broken)
        assert cli.main(["made-up"]) == 1
        monkeypatch.undo()
    assert len(done) == 3
