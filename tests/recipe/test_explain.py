"""`spec show --why`: meanings come from the docstrings, stages from the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speculators import models
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.explain import Why, explain
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.structure.origin import comment_at

Write = Callable[..., str]

# Another valid value for each key that needs one of its own; numbers and truth values change by themselves.
OTHER = {
    "minutes": "minutes=5",
    "name": 'name="another"',
    "version": 'version="2.0.0"',
    "summary": 'summary="other text"',
    "hardware": 'hardware="a phone"',
    "verifier.model": 'verifier.model="owner/other"',
    "verifier.revision": 'verifier.revision="def"',
    "verifier.dtype": 'verifier.dtype="float32"',
    "verifier.template": "verifier.template={enable_thinking=false}",
    "verifier.chat_template": 'verifier.chat_template="./other.jsonl"',
    "data.train_on": 'data.train_on="last"',
    "data.sources[0].path": "data.sources=[{path='other.jsonl'}]",
    "data.sources[0].take": "data.sources=[{path='rows.jsonl', take=1}]",
    "data.sources[0].split": "data.sources=[{path='rows.jsonl', split='train'}]",
    "data.sources[0].map": "data.sources=[{path='rows.jsonl', map={messages='dialog'}}]",
    "data.max_tokens": "data.max_tokens=128",
    "data.states_dtype": 'data.states_dtype="float16"',
    "data.server.endpoints": 'data.server.endpoints=["https://elsewhere:1/v1"]',
    "data.store": 'data.store="s3://elsewhere/states"',
    "data.server.folder": 'data.server.folder="/shared"',
    "data.regenerate.dtype": 'data.regenerate.dtype="float16"',
    "algorithm.name": 'algorithm.name="mtp"',
    "algorithm.target_layer_ids": "algorithm.target_layer_ids=[1, 2, 3]",
    "algorithm.decoder": "algorithm.decoder={intermediate_size=8}",
    "algorithm.weights": 'algorithm.weights="walk"',
    "schedule.max_steps": "schedule.max_steps=9",
    "benchmark.timed_dtype": 'benchmark.timed_dtype="float16"',
    "schedule.row_tokens": "schedule.row_tokens=512",
    "schedule.tokens_per_step": "schedule.tokens_per_step=2048",
    "schedule.optimizer.name": 'schedule.optimizer.name="muon"',
    "schedule.optimizer.betas": "schedule.optimizer.betas=[0.8, 0.9]",
    "schedule.learning_rate.shape": 'schedule.learning_rate.shape="linear"',
    "schedule.ema": "schedule.ema=0.99",
    "schedule.precision": 'schedule.precision="fp32"',
    "schedule.gradient_precision": 'schedule.gradient_precision="bf16"',
    "schedule.evaluate_every": "schedule.evaluate_every=5",
    "schedule.checkpoint_every": "schedule.checkpoint_every=5",
    "benchmark.suites[0].name": "benchmark.suites=[{name='other', path='rows.jsonl', split='test'}]",
    "benchmark.suites[0].path": "benchmark.suites=[{name='held', path='other.jsonl', split='test'}]",
    "benchmark.suites[0].split": "benchmark.suites=[{name='held', path='rows.jsonl', split='other'}]",
    "benchmark.suites[0].take": "benchmark.suites=[{name='held', path='rows.jsonl', split='test', take=3}]",
    "benchmark.suites[0].map": "benchmark.suites=[{name='held', path='rows.jsonl', split='test', map={turns='t'}}]",
    "benchmark.num_speculative_tokens": "benchmark.num_speculative_tokens=[3, 7]",
    "benchmark.temperature": "benchmark.temperature=[1.0]",
    "benchmark.baselines": "benchmark.baselines=[]",
    "benchmark.trees": 'benchmark.trees=["2x1"]',
    "tracking.sinks": 'tracking.sinks=["wandb"]',
    "expect": "expect={'held/K=3/T=0' = {tau=[1.0, 2.0], source='a run'}}",
}
# These have no second value that goes with the rest of the recipe, or (format, extends) say how it is written.
FIXED = {
    *("format", "extends", "verifier.sha256", "data.hidden_states", "data.sources[0].revision"),
    *("data.sources[0].subset", "benchmark.suites[0].subset", "benchmark.suites[0].revision"),
    # They need a temperature above 0: test_sampling.py.
    *("benchmark.top_p", "benchmark.top_k", "benchmark.min_p", "benchmark.verification"),
    *("data.sources[0].sha256", "algorithm.module", "algorithm.init_from", "schedule.optimizer.adamw_lr"),
}
KINDS = {
    "cached": ('data.hidden_states="cached"',),
    "online": ('data.hidden_states="online"',),
    "served": ('data.hidden_states="server"',),
    "streamed": ('data.hidden_states="streamed"',),
    "regenerated": ('data.hidden_states="cached"', "data.regenerate={max_new_tokens=8}"),
}


def other_value(key: str, value: Any) -> str:
    if key in OTHER:
        return OTHER[key]
    assert isinstance(value, (bool, int, float)), f"{key}: name another value than {value!r} in OTHER"
    changed = str(not value).lower() if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2
    return f"{key}={changed or 0.5}"


def own_inputs(plan: Plan) -> dict[str, dict[str, Any]]:
    """The inputs of each stage without the fingerprints of the stages that it reads."""
    stages = plan.inputs()
    return {name: {key: inputs[key] for key in inputs if key not in stages} for name, inputs in stages.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_named_are_exactly_those_whose_fingerprints_change(
    write: Write, llama: VerifierFacts, kind: str
) -> None:
    """Changes every value of a recipe, one at a time, and compares the plans."""
    path = write()
    Path("other.jsonl").write_text('{"messages": [1]}\n')
    recipe = load_recipe(path, KINDS[kind])
    before = make_plan(recipe, llama)
    for key, value in flatten(recipe).items():
        if key in FIXED or (key == "data.regenerate" and value is None):
            continue
        # It is read only where states are stored.
        if key == "data.store" and kind in ("online", "streamed"):
            continue
        # Online states come from a whole verifier in each process.
        if (kind, key) == ("online", "distributed.shard_verifier"):
            continue
        after = make_plan(load_recipe(path, (*KINDS[kind], other_value(key, value))), llama)
        assert after.recipe != recipe, key
        (why,) = explain(recipe, key)
        fingerprints = before.fingerprints()
        changed = {name for name, digest in after.fingerprints().items() if digest != fingerprints[name]}
        assert {*why.enters, *why.reruns} == changed, key
        one, other = own_inputs(before), own_inputs(after)
        assert set(why.enters) == {name for name in one if one[name] != other[name]}, key


def test_where_the_states_come_from_decides_which_stages_there_are(write: Write) -> None:
    """Stored states enter the stage that captures them, too."""
    path = write()
    stored, unstored = ("capture", "train"), ("train",)
    for kind, stages in {"online": unstored, "cached": stored, "served": stored, "streamed": unstored}.items():
        (why,) = explain(load_recipe(path, KINDS[kind]), "data.hidden_states")
        assert why.enters == stages


def test_every_value_of_every_recipe_has_a_meaning() -> None:
    """The docstrings of the schema and of the algorithms' configs leave no key out."""
    lacking = {why.path for name in recipe_names() for why in explain_all(load_recipe(name)) if not why.means}
    assert lacking == set()
    ours = {file.parent.name for file in Path(models.__file__).parent.glob("*/core.py")}
    assert {load_recipe(name).algorithm.name for name in recipe_names()} >= ours


def explain_all(recipe: Recipe) -> Iterator[Why]:
    for section in {path.partition(".")[0].partition("[")[0] for path in recipe.origins}:
        yield from explain(recipe, section)


def test_a_value_from_the_command_line_says_so(write: Write) -> None:
    """Its origin is --set, and it does not claim a comment of the file."""
    (why,) = explain(load_recipe(write(), ["seed=4"]), "seed")
    assert (why.origin, why.comment, why.value) == ("--set", "", 4)


def test_a_value_from_the_command_line_names_what_it_replaced(write: Write) -> None:
    """The recipe's own value with its place, or the default; nothing if the recipe has no such value."""
    path = write()
    sets = ["data.max_tokens=128", "schedule.epochs=3", 'data.sources=[{path="rows.jsonl"}, {path="rows.jsonl"}]']
    recipe, written = load_recipe(path, sets), load_recipe(path)
    replaced = {why.path: why.replaces for key in ("data", "schedule.epochs") for why in explain(recipe, key, written)}
    assert replaced["data.max_tokens"] == {"value": 256, "origin": "mine.toml:11"}
    assert replaced["schedule.epochs"] == {"value": 1, "origin": "default"}
    assert replaced["data.sources[1].path"] is None
    assert replaced["data.hidden_states"] is None


def test_an_inherited_value_names_the_file_it_comes_from(write: Write) -> None:
    """`extends`, its file and line, and the comment there."""
    write(("max_tokens = 256", "max_tokens = 256  # as served"))
    child = write(name="child.toml", text='format = 1\nname = "child"\nversion = "1.0.0"\nextends = "./mine.toml"\n')
    (why,) = explain(load_recipe(child), "data.max_tokens")
    assert (why.origin, why.comment) == ("extends mine.toml:11", "as served")


def test_a_hash_inside_a_text_does_not_start_a_comment() -> None:
    """Only the text behind the value is a comment."""
    assert comment_at('model = "wheel:a==1#b.gguf"  # the small one', 1) == "the small one"
    assert comment_at('model = "a#b"', 1) == ""


def test_the_origin_of_a_shipped_value_is_short() -> None:
    """`quickstart.toml:13`, wherever the package is installed; the file can still be opened."""
    origins = load_recipe("quickstart_short", ["seed=1"]).origins
    assert str(origins["seed"]) == "--set"
    assert str(origins["schedule.epochs"]).startswith("quickstart_short.toml:")
    assert str(origins["algorithm.ttt_steps"]).startswith("extends quickstart.toml:")
    assert Path(origins["algorithm.ttt_steps"].file or "").is_file()
