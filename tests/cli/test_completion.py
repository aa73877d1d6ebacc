"""`spec completion` offers what may end a command line, and its scripts work in the installed shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import Spec

from speculators.cli import VERBS
from speculators.cli.completion import SCRIPTS, candidates
from speculators.config import CONFIGS
from speculators.recipe.catalog import recipe_names, suite_names

# Stands for the installed program; each shell defines a function of this name.
PROGRAM = f"{sys.executable} -m speculators.cli"


def test_the_first_word_is_a_verb() -> None:
    """All verbs are offered, or those that begin with the typed text."""
    assert candidates("spec ") == [*VERBS, "--help", "--version"]
    assert candidates("spec v") == ["validate"]
    assert candidates("spec nonsense ") == []


def test_recipes_are_offered_where_a_verb_takes_one() -> None:
    """Recipes are offered by name; for a path, the shell completes the file. A surplus argument gets nothing."""
    assert candidates("spec run ") == recipe_names()
    assert candidates("spec run --nproc 2 quickstart_m") == ["quickstart_medusa", "quickstart_mtp"]
    assert candidates("spec validate smoke smoll") == ["smollm2_eagle3"]
    assert candidates("spec diff smoke smoll") == ["smollm2_eagle3"]
    assert candidates("spec run ./mi") == []
    assert candidates("spec run smoke ") == []
    assert candidates("spec cp smoke ") == []


def test_runs_are_offered_where_a_verb_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs that take a recipe take a run, too."""
    (tmp_path / "runs" / "mine-12345678").mkdir(parents=True)
    (tmp_path / "runs" / "mine-12345678" / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for verb in ("bench", "report", "rm", "run", "show", "diff smoke", "reproduce", "lock --check"):
        assert candidates(f"spec {verb} mi") == ["mine-12345678"], verb


def test_options_are_those_of_the_verb() -> None:
    """The options that all verbs share are included; the value of an option is not taken for an option."""
    assert {"--set", "--runs", "--nproc", "--json", "--quiet", "--help"} <= set(candidates("spec run smoke --"))
    assert candidates("spec export RUN --verifier-n") == ["--verifier-name"]
    assert "--tensor-parallel-size" not in candidates("spec serve-states smoke -- --")


def test_values_of_options_are_offered() -> None:
    """Choices, suites and stages are offered by name; numbers and files are left to the user."""
    assert candidates("spec bench RUN --engine ") == ["vllm", "sglang"]
    assert candidates("spec bench RUN --suite ") == suite_names()
    assert candidates("spec reproduce RUN --until c") == ["capture"]
    assert candidates("spec run smoke --runs ") == []
    assert candidates("spec run smoke --nproc ") == []


def test_keys_are_those_of_the_recipe_on_the_line() -> None:
    """`--why` takes a key, `--set` a key and a value; algorithms are offered with the quotes that TOML needs."""
    assert candidates("spec show smoke --why algorithm.ttt_s") == ["algorithm.ttt_steps"]
    assert candidates("spec show quickstart_dflash --why algorithm.block") == ["algorithm.block_size"]
    assert candidates("spec run smoke --set schedule.optimizer.l") == ["schedule.optimizer.lr="]
    named = [f'algorithm.name="{name}"' for name in CONFIGS.names()]
    assert candidates("spec run smoke --set algorithm.name=") == named
    assert candidates("spec run smoke --set algorithm.name=mt") == ['algorithm.name="mtp"']
    assert candidates("spec run --set sched") == [each for each in candidates("spec run --set ") if "schedule" in each]


def test_a_line_that_cannot_be_parsed_is_not_an_error() -> None:
    """An unfinished line may have an open quote, an unknown recipe or nothing at all."""
    assert candidates("spec run smoke --set 'schedule.epo") == []
    assert candidates("spec show nowhere --why seed") == ["seed"]
    assert candidates("") == candidates("spec ")


def test_a_shell_must_be_named(tmp_path: Path) -> None:
    """It must be one of the three that are supported."""
    spec = Spec(tmp_path)
    assert spec("completion").code == 2
    assert spec("completion", "tcsh").code == 2
    assert spec("completion", "bash").out.strip() == spec("completion", "bash", "--json").json["script"]


ASK = {
    "bash": """spec() {{ {program} "$@"; }}
{script}
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(spec); COMP_WORDBREAKS=' ="'
_spec; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "zsh": """spec() {{ {program} "$@" }}
compdef() {{ }}; _files() {{ print files }}
compadd() {{ while [[ $1 != -- ]] {{ shift }}; shift; print -l -- "$@" }}
{script}
words=({line}); CURRENT=$#words; _spec""",
    "fish": """function spec; {program} $argv; end
{script}
complete -C '{line}'""",
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_completes_a_recipe(shell: str, tmp_path: Path) -> None:
    """The printed script works in the shell itself."""
    assert shell_completes(shell, "spec run quickstart_m", tmp_path) == ["quickstart_medusa", "quickstart_mtp"]


def test_bash_replaces_only_the_text_behind_the_equals_sign(tmp_path: Path) -> None:
    """In bash a word ends at "=", and the quotes must reach the program."""
    line = "spec run smoke --set algorithm.name=mt"
    assert shell_completes("bash", line, tmp_path) == ['\\"mtp\\"']


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_completes_a_file_where_nothing_is_known(shell: str, tmp_path: Path) -> None:
    """In bash `complete -o default` does this, which cannot be tested outside an interactive shell."""
    (tmp_path / "mine.toml").write_text("")
    assert shell_completes(shell, "spec run ./mi", tmp_path) == (["files"] if shell == "zsh" else ["./mine.toml"])


def shell_completes(shell: str, line: str, folder: Path) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = ASK[shell].format(program=PROGRAM, script=SCRIPTS[shell], line=line)
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *options, "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    return [completed.partition("\t")[0] for completed in done.stdout.splitlines()]
