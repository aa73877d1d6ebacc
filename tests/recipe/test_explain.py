"""`spec show --why`: meanings come from the docstrings, stages from the plan itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from speculators import models
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.explain import explain
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.structure.origin import comment_at

Write = Callable[..., str]

# Another value for each key that changes a recipe's meaning by itself.
OTHER = {
    "seed": "seed=1",
    "verifier.revision": 'verifier.revision="def"',
    "verifier.dtype": 'verifier.dtype="float32"',
    "verifier.trust_remote_code": "verifier.trust_remote_code=true",
    "data.sources[0].take": "data.sources=[{path='rows.jsonl', take=1}]",
    "data.max_tokens": "data.max_tokens=128",
    "data.states_dtype": 'data.states_dtype="float16"',
    "data.server.endpoint": 'data.server.endpoint="https://elsewhere:1/v1"',
    "data.server.folder": 'data.server.folder="/shared"',
    "data.server.concurrency": "data.server.concurrency=64",
    "data.server.retries": "data.server.retries=0",
    "data.server.timeout": "data.server.timeout=5.0",
    "data.regenerate.max_new_tokens": "data.regenerate.max_new_tokens=4",
    "data.regenerate.dtype": 'data.regenerate.dtype="float16"',
    "algorithm.ttt_steps": "algorithm.ttt_steps=5",
    "algorithm.draft_vocab_size": "algorithm.draft_vocab_size=65",
    "algorithm.target_layer_ids": "algorithm.target_layer_ids=[1, 2, 3]",
    "algorithm.decoder": "algorithm.decoder={intermediate_size=8}",
    "schedule.optimizer.lr": "schedule.optimizer.lr=2e-3",
    "schedule.row_tokens": "schedule.row_tokens=512",
    "schedule.checkpoint_every": "schedule.checkpoint_every=5",
    "schedule.keep_checkpoints": "schedule.keep_checkpoints=5",
    "distributed.shard": "distributed.shard=false",
    "benchmark.suites[0].split": "benchmark.suites=[{name='held', path='rows.jsonl', split='other'}]",
    "benchmark.num_speculative_tokens": "benchmark.num_speculative_tokens=[3, 7]",
    "benchmark.temperature": "benchmark.temperature=[1.0]",
    "benchmark.live_prompts": "benchmark.live_prompts=2",
    "summary": 'summary="other words"',
    "version": 'version="2.0.0"',
}
KINDS = {
    "cached": ('data.hidden_states="cached"',),
    "online": ('data.hidden_states="online"',),
    "served": ('data.hidden_states="server"',),
    "regenerated": ('data.hidden_states="cached"', "data.regenerate={max_new_tokens=8}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_that_are_told_are_those_whose_fingerprints_change(
    write: Write, llama: VerifierFacts, kind: str
) -> None:
    """Each value is changed, and the plan compared: nothing is told that does not happen, nothing happens untold."""
    path = write()
    for key, override in OTHER.items():
        if key.startswith("data.regenerate") and kind != "regenerated":
            continue
        recipe = load_recipe(path, KINDS[kind])
        before = make_plan(recipe, llama)
        after = make_plan(load_recipe(path, (*KINDS[kind], override)), llama)
        changed = {stage.name for stage in after.stages if stage.fingerprint != before.stage(stage.name).fingerprint}
        (why,) = explain(recipe, key)
        assert {*why.enters, *why.reruns} == changed, key
        own = {
            stage.name
            for stage in after.stages
            if {k: v for k, v in stage.inputs.items() if k not in before_names(before)}
            != {k: v for k, v in before.stage(stage.name).inputs.items() if k not in before_names(before)}
        }
        # max_tokens is the length of a row, too, where row_tokens is left to it.
        assert set(why.enters) == own - ({"train"} if key == "data.max_tokens" else set()), key


def before_names(plan) -> set[str]:
    return {stage.name for stage in plan.stages}


def test_every_value_of_every_recipe_has_a_meaning() -> None:
    """The docstrings of the schema and of the algorithms' configs leave no key out."""
    lacking = {why.path for name in recipe_names() for why in explain_all(name) if not why.means}
    assert lacking == set()
    ours = {file.parent.name for file in Path(models.__file__).parent.glob("*/core.py")}
    assert {load_recipe(name).algorithm.name for name in recipe_names()} >= ours


def explain_all(name: str):
    recipe = load_recipe(name)
    return [why for top in recipe_keys(recipe) for why in explain(recipe, top)]


def recipe_keys(recipe) -> set[str]:
    return {path.partition(".")[0].partition("[")[0] for path in recipe.origins}


def test_a_value_of_the_command_line_says_so(write: Write) -> None:
    """Its origin is --set, and no comment of the file is taken for its own."""
    (why,) = explain(load_recipe(write(), ["seed=4"]), "seed")
    assert (why.origin, why.comment, why.value) == ("--set", "", 4)


def test_a_value_of_the_command_line_tells_what_it_replaced(write: Write) -> None:
    """The recipe's own value with its place, or the default; nothing where the recipe has no such value."""
    path = write()
    sets = ["data.max_tokens=128", "schedule.epochs=3", 'data.sources=[{path="rows.jsonl"}, {path="rows.jsonl"}]']
    recipe, written = load_recipe(path, sets), load_recipe(path)
    told = {why.path: why.replaces for key in ("data", "schedule.epochs") for why in explain(recipe, key, written)}
    assert told["data.max_tokens"] == {"value": 256, "origin": "mine.toml:11"}
    assert told["schedule.epochs"] == {"value": 1, "origin": "default"}
    assert told["data.sources[1].path"] is None
    assert told["data.hidden_states"] is None


def test_an_inherited_value_names_the_file_that_says_it(write: Write) -> None:
    """`extends`, its file and line, and the comment there."""
    write(("max_tokens = 256", "max_tokens = 256  # as served"))
    child = write(name="child.toml", text='format = 1\nname = "child"\nversion = "1.0.0"\nextends = "./mine.toml"\n')
    (why,) = explain(load_recipe(child), "data.max_tokens")
    assert (why.origin, why.comment) == ("extends mine.toml:11", "as served")


def test_a_hash_in_a_text_is_no_comment() -> None:
    """Only what stands behind the value is."""
    assert comment_at('model = "wheel:a==1#b.gguf"  # the small one', 1) == "the small one"
    assert comment_at('model = "a#b"', 1) == ""
