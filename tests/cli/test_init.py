"""`spec init` writes a recipe that is valid, commented truly, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Spec
from facts import FIXTURES

from speculators.cli import main
from speculators.config import CONFIGS
from speculators.recipe.load import load_recipe
from speculators.verifier.tiny import make_tiny_verifier

LLAMA = str(FIXTURES / "llama-3.1-8b" / "config.json")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("algorithm", CONFIGS.names())
def test_the_recipe_of_every_algorithm_is_valid_and_servable(
    algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes `spec validate`, also with the line that is commented out, and keeps every server that reads it."""
    made = ("init", "owner/My-Model.1", "--verifier-config", LLAMA, "--algorithm", algorithm, "--quiet")
    assert main([*made, "--out", "mine.toml"]) == 0
    file = Path("mine.toml")
    file.write_text(file.read_text().replace("# regenerate =", "regenerate ="))
    assert main(["validate", "./mine.toml", "--verifier-config", LLAMA]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("  servable by: vLLM" if algorithm != "mtp" else "  servable by: no server"), line


def test_its_comments_state_what_the_plan_computes() -> None:
    """Layer ids, disk per token, rows and processes are those of the recipe."""
    assert main(["init", "owner/mine", "--verifier-config", LLAMA, "--gpus", "8xH100-80GB", "--quiet"]) == 0
    file = next(Path().glob("*_mine.toml"))
    text, recipe = file.read_text(), load_recipe(f"./{file}")
    assert recipe.verifier.dtype == "bfloat16"
    assert recipe.schedule.tokens_per_step == 8 * 4 * 2048
    assert "# 4 rows of 2048 tokens on each of 8 processes" in text
    assert "# It reads the verifier's states 2, 16, 29 of 32." in text
    assert "32.8 kB of disk per token" in text
    assert recipe.algorithm.config.target_layer_ids is None


def test_a_draft_for_gemma_has_an_activation_that_servers_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A draft inherits Gemma's GELU, with which no server loads it; the recipe says why it has another."""
    config = {**json.loads(Path(LLAMA).read_text()), "hidden_act": "gelu_pytorch_tanh"}
    (tmp_path / "gemma.json").write_text(json.dumps(config))
    assert main(["init", "owner/gemma", "--verifier-config", "gemma.json", "--out", "mine.toml", "--quiet"]) == 0
    assert main(["validate", "./mine.toml", "--verifier-config", "gemma.json"]) == 0
    assert "servable by: vLLM, SGLang" in capsys.readouterr().out
    assert 'decoder = { hidden_act = "silu" }' in Path("mine.toml").read_text()


def test_it_runs_from_end_to_end(fresh: Spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder and a file of conversations are enough; the plan is shown, and an existing file is left alone."""
    make_tiny_verifier(tmp_path / "mine")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n} now."},
            ]
        }
        for n in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = fresh("init", "mine", "--data", "chats.jsonl", "--out", "first.toml")
    assert outcome.code == 0, outcome.err
    assert "servable by" in outcome.out
    recipe = load_recipe("./first.toml")
    assert Path(recipe.verifier.model) == tmp_path / "mine"
    small = ("--set", "schedule.max_steps=2", "--set", 'benchmark.suites=[{name="quickstart", take=2}]')
    small += ("--set", "benchmark.max_new_tokens=8", "--set", "benchmark.live_prompts=1")
    outcome = fresh("run", "./first.toml", "--runs", fresh.runs, *small)
    assert outcome.code == 0, outcome.err
    outcome = fresh("init", "mine", "--data", "chats.jsonl", "--out", "first.toml")
    assert outcome.code == 2
    assert "first.toml exists already" in outcome.err


def test_a_recipe_that_could_not_run_is_not_left_behind(fresh: Spec, tmp_path: Path) -> None:
    """A config.json with a wrong size, and a missing file of conversations, are errors; nothing is written."""
    config = json.loads(Path(LLAMA).read_text())
    config["intermediate_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = fresh("init", "owner/mine", "--verifier-config", "config.json")
    assert outcome.code == 2
    assert "intermediate_size" in outcome.err
    assert fresh("init", "owner/mine", "--verifier-config", LLAMA, "--data", "nowhere.jsonl").code == 2
    assert not list(tmp_path.glob("*.toml"))
