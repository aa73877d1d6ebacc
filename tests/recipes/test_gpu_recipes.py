"""Recipes that are planned for GPUs: what all of them have, what their families add, and the figures of their plans."""

from __future__ import annotations

import re
import shlex

import pytest
from command import Spec

from speculators.files.disk import size_text
from speculators.recipe.catalog import recipe_names, recipe_path
from speculators.recipe.load import load_recipe
from speculators.report.progress import duration

PLANNED = [name for name in recipe_names() if load_recipe(name).hardware.endswith("planned")]
# A command in a recipe's comment, and the line below it.
FIGURES = re.compile(r"^# .*`(spec plan [^`]+)`.*\n# (\dx.*)$", re.MULTILINE)
ON_CPUS = ("quickstart", "smoke", "smollm2")


def plans_of(name: str) -> list[tuple[str, str]]:
    """Finds the commands in a recipe's comments, and the figures that it states for each."""
    return FIGURES.findall(recipe_path(name).read_text(encoding="utf-8"))


def test_a_recipe_that_has_not_run_says_so() -> None:
    """Only those for CPU cores have run."""
    assert [name for name in recipe_names() if not name.startswith(ON_CPUS)] == PLANNED


@pytest.mark.parametrize("name", PLANNED)
def test_the_verifier_writes_the_answers(name: str) -> None:
    """Sampled, as it is served, and up to the length that a conversation may have."""
    data = load_recipe(name).data
    assert data.regenerate is not None
    assert data.regenerate.temperature > 0
    assert data.regenerate.max_new_tokens <= data.max_tokens


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_for_one_four_and_eight_gpus_is_stated(name: str) -> None:
    """The command names the recipe, and each kind of machine has its figures."""
    (command, figures), *_ = plans_of(name)
    assert shlex.split(command)[:3] == ["spec", "plan", name]
    assert re.findall(r"(\d)x\w+ ", figures) == ["1", "4", "8"]


@pytest.mark.parametrize("name", ["dflash_qwen3_8b_thinking", "eagle3_r1_llama8b"])
def test_reasoning_is_trained_on(name: str) -> None:
    """Thinking stays on, and answers may be long, in training as in the benchmark."""
    recipe = load_recipe(name)
    assert recipe.verifier.template.get("enable_thinking", True)
    assert recipe.data.regenerate is not None
    assert recipe.data.regenerate.max_new_tokens >= 8192
    assert recipe.benchmark.max_new_tokens >= 2048


@pytest.mark.parametrize("name", ["dflash_qwen3_8b", "dflash_qwen3_8b_thinking"])
def test_dflash_follows_the_published_recipe(name: str) -> None:
    """vllm-project/speculators RFC 979: whole vocabulary, causal window of 2,048, D-PACE, Muon."""
    recipe = load_recipe(name)
    config = recipe.algorithm.config
    assert (config.draft_vocab_size, config.decoder) == (None, {"sliding_window": 2048})
    assert (config.sliding_window_non_causal, config.weights) == (False, "d-pace")
    assert recipe.schedule.optimizer.name == "muon"


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_figures_are_those_of_the_plan(name: str, spec: Spec) -> None:
    """A change of the recipe or of the estimate must reach the comment.

    The planned machine has room, and `minutes` is the time on it without the answers, rounded to tens.
    """
    recipe = load_recipe(name)
    machine, memory = recipe.hardware.removesuffix("GB, planned").split("-")
    for command, figures in plans_of(name):
        devices = spec(*shlex.split(command)[1:], "--json").json["costs"]["devices"]
        for device in devices:
            device["seconds"] = {stage: time["seconds"] for stage, time in device["seconds"].items()}
        stated = [
            f"{at['device']} {duration(at['seconds']['train'])}, {size_text(at['memory_total'])}" for at in devices
        ]
        assert figures == "; ".join(stated)
        for planned in [at for at in devices if at["device"] == machine]:
            minutes = (sum(planned["seconds"].values()) - planned["seconds"]["prepare"]) / 60
            assert recipe.minutes == round(minutes, -1)
            assert max(planned["memory_total"], planned["memory_verifier"]) < int(memory) * 1e9
