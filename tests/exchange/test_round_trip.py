"""`spec export`, `spec import` and `algorithm.init_from` work on the smoke run as users type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Spec
from safetensors.torch import load_file

from speculators.verifier.tiny import CHAT_TEMPLATE

BENCH = ("--prompts", "2", "--k", "2", "--live", "1", "--json")
SHORT = ("--set", "schedule.max_steps=2", "--set", "benchmark.suites=[]")


def test_a_run_is_exported_imported_and_measures_the_same(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """In float32 the re-imported checkpoint equals the run's, and its benchmark has the same numbers."""
    outcome = spec("export", run_folder, "--to", "vllm", "--dtype", "float32", "--out", tmp_path / "vllm", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["command"] == f"vllm serve {tmp_path / 'vllm'}"
    verifier = outcome.json["verifier"]
    back = tmp_path / "run"
    shutil.copytree(run_folder, back, ignore=shutil.ignore_patterns("checkpoints", "speculator"))
    outcome = spec("import", tmp_path / "vllm", "--verifier", verifier, "--out", back / "speculator", "--json")
    assert outcome.code == 0, outcome.err
    folders = (run_folder / "speculator", back / "speculator")
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all((other[name] == tensor).all() for name, tensor in one.items())
    first, second = (spec("bench", folder, *BENCH).json for folder in folders)
    assert [each["exact"] for each in first["settings"]] == [each["exact"] for each in second["settings"]]


def test_a_verifier_that_config_json_names_is_checked_against_in_another_cache_too(
    spec: Spec, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export may use another cache than the run; the check is skipped only if the folder no longer exists."""
    monkeypatch.setattr(spec, "cache", tmp_path / "empty")
    outcome = spec("export", run_folder, "--to", "vllm", "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    (note,) = outcome.json["notes"]
    assert "give its hub id with --verifier-name" in note
    moved = tmp_path / "moved"
    shutil.copytree(run_folder / "speculator", moved)
    config = json.loads((moved / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    outcome = spec("export", moved, "--to", "vllm", "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    assert "was not checked" in outcome.json["notes"][0]


def test_an_export_of_a_run_is_served_with_the_template_arguments_of_its_recipe(
    spec: Spec, run_folder: Path, tmp_path: Path
) -> None:
    """`[verifier] template` reaches the command from the plan of the run."""
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    plan = json.loads((copy / "plan.json").read_text())
    (tmp_path / "reads.jinja").write_text(CHAT_TEMPLATE + "{% if enable_thinking %}<think>{% endif %}")
    plan["recipe"]["verifier"]["chat_template"] = str(tmp_path / "reads.jinja")
    plan["recipe"]["verifier"]["template"] = {"enable_thinking": False}
    (copy / "plan.json").write_text(json.dumps(plan))
    outcome = spec("export", copy, "--to", "vllm", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["command"].endswith("""--default-chat-template-kwargs '{"enable_thinking": false}'""")


def test_the_card_of_a_run_has_its_recipe_its_lock_and_its_numbers(
    spec: Spec, run_folder: Path, tmp_path: Path
) -> None:
    """Each acceptance length has its definition, and the card contains everything needed to reproduce the run."""
    outcome = spec("export", run_folder, "--to", "hub", "--out", tmp_path / "hub", "--verifier-name", "owner/model")
    assert outcome.code == 0, outcome.err
    card = (tmp_path / "hub" / "README.md").read_text()
    lock = json.loads((run_folder / "lock.json").read_text())
    bench = json.loads(next((run_folder / "bench").glob("*.json")).read_text())
    for text in (
        "base_model: owner/model",
        (run_folder / "recipe.toml").read_text().strip(),
        lock["fingerprints"]["train"][:12],
        bench["settings"][0]["definition"],
        f"{bench['settings'][0]['exact']['tau']:.3f}",
    ):
        assert text in card
    assert outcome.out.strip().endswith(f"vllm serve {tmp_path / 'hub'}")


def test_an_export_that_cannot_be_served_is_an_error_without_a_traceback(
    spec: Spec, run_folder: Path, tmp_path: Path
) -> None:
    """The smoke run norms before the residual, which SGLang does not; --push is only for a card."""
    outcome = spec("export", run_folder, "--to", "sglang", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "norm_before_residual" in outcome.err
    outcome = spec("export", run_folder, "--to", "vllm", "--push", "me/draft")
    assert outcome.code == 2
    assert "--push needs --to hub" in outcome.err


def test_training_starts_from_a_checkpoint(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """The first update starts from the checkpoint's weights; its content is in the fingerprint, its path is not."""
    start = run_folder / "speculator"
    outcome = spec("run", "smoke", "--runs", tmp_path, *SHORT, "--set", f'algorithm.init_from="{start}"', "--json")
    assert outcome.code == 0, outcome.err
    chance = spec("run", "smoke", "--runs", tmp_path, *SHORT, "--json")
    runs = [Path(each.json["run"]) for each in (outcome, chance)]
    losses = [_first_loss(run) for run in runs]
    assert losses[0] < losses[1]
    plans = [json.loads((run / "plan.json").read_text()) for run in runs]
    inputs = [{stage["name"]: stage["inputs"] for stage in plan["stages"]}["train"] for plan in plans]
    assert set(inputs[0]["init_from"]) == {"config.json", "model.safetensors"}
    assert "init_from" not in inputs[1]
    assert str(start) not in json.dumps(inputs[0])
    trained = load_file(runs[0] / "speculator" / "model.safetensors")
    assert (trained["d2t"] == load_file(start / "model.safetensors")["d2t"]).all()


def _first_loss(run: Path) -> float:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(event["loss"] for event in lines if event["event"] == "StepEvent")


def test_a_start_of_another_shape_is_one_error(spec: Spec, run_folder: Path, tmp_path: Path) -> None:
    """All differences are reported before training starts; a missing folder is reported on loading."""
    start = ("--runs", tmp_path, *SHORT, "--set", f'algorithm.init_from="{run_folder / "speculator"}"')
    outcome = spec("run", "smoke", *start, "--set", "algorithm.num_layers=2")
    assert outcome.code == 1
    assert "it lacks layers.1.self_attn.q_proj.weight" in outcome.err
    anew = ("--set", "algorithm.target_layer_ids=[1, 2]", "--set", "algorithm.norm_before_residual=false")
    outcome = spec("run", "smoke", *start, *anew)
    assert outcome.code == 1
    assert "set algorithm.target_layer_ids = [" in outcome.err
    assert "set algorithm.norm_before_residual = true" in outcome.err
    assert "capture" not in outcome.err
    outcome = spec("run", "smoke", *start, "--set", "algorithm.draft_vocab_size=64")
    assert outcome.code == 1
    assert "set algorithm.draft_vocab_size" in outcome.err
    outcome = spec("validate", "smoke", "--set", 'algorithm.init_from="./nowhere"')
    assert outcome.code == 2
    assert "no config.json in" in outcome.err
