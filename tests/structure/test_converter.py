"""The converter takes values exactly as written, or reports all that are wrong."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import pytest

from speculators.recipe.input_sections import Regenerate
from speculators.recipe.schema import BenchmarkSection, ScheduleSection, Suite
from speculators.structure.converter import structure


@attrs.frozen
class Sample:
    """One field of each kind."""

    whole: int = 0
    real: float = 0.0
    yes: bool = False
    text: str = ""
    many: tuple[str, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    items: list[int] = attrs.field(factory=list)
    weights: dict[str, float] = attrs.field(factory=dict)
    anything: dict[str, Any] = attrs.field(factory=dict)
    maybe: int | None = 3
    maybe_text: str | None = None
    either: str | int = 0
    word: Literal["left", "right"] = "left"
    nested: Regenerate | None = None


def problems_of(data: Any, cls: type = Sample) -> dict[str, str]:
    value, problems = structure(data, cls)
    assert (value is None) == bool(problems)
    return {problem.path: f"{problem.message} {problem.hint}".strip() for problem in problems}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("whole", 3.7, "must be an integer, got 3.7"),
        ("whole", 3.0, "must be an integer, got 3.0"),
        ("whole", "3", 'must be an integer, got "3"'),
        ("whole", True, "must be an integer, got true"),
        ("real", "1e-4", 'must be a number, got "1e-4"'),
        ("real", True, "must be a number, got true"),
        ("real", float("nan"), "must be a number, got NaN"),
        ("real", float("inf"), "must be a number, got Infinity"),
        ("yes", "false", 'must be true or false, got "false" without quotes'),
        ("yes", 1, "must be true or false, got 1"),
        ("text", 3, "must be a string, got 3"),
        ("text", ["a"], 'must be a string, got ["a"]'),
        ("many", "abc", 'must be a list of strings, got "abc"'),
        ("pair", [1], "must be a list of 2 integers, got [1]"),
        ("items", {"a": 1}, "must be a list of integers, got a table"),
        ("weights", [1.0], "must be a table, got [1.0]"),
        ("maybe", "3", 'must be an integer, got "3"'),
        ("either", 1.5, "must be a string or an integer, got 1.5"),
        ("word", "lef", """must be one of "left", "right", got "lef" did you mean 'left'?"""),
        ("nested", 3, "must be a table, got 3"),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_coerced(key: str, value: Any, message: str) -> None:
    """Values that cattrs would convert (3.7 -> 3, "false" -> True, "abc" -> a tuple) are errors here."""
    assert problems_of({key: value}) == {key: message}


def test_values_of_the_right_type_pass_unchanged() -> None:
    """Each annotation takes its own TOML type; a number may be an integer."""
    data = {
        "whole": 3,
        "real": 1,
        "yes": True,
        "text": "x",
        "many": ["a", "b"],
        "pair": [1, 2],
        "items": [1],
        "weights": {"kl": 1},
        "anything": {"deep": [{"x": 1}]},
        "maybe_text": "x",
        "either": "10%",
        "word": "right",
        "nested": {"seed": 4},
    }
    value, problems = structure(data, Sample)
    assert problems == []
    assert value == Sample(
        whole=3,
        real=1.0,
        yes=True,
        text="x",
        many=("a", "b"),
        pair=(1, 2.0),
        items=[1],
        weights={"kl": 1.0},
        anything={"deep": [{"x": 1}]},
        maybe_text="x",
        either="10%",
        word="right",
        nested=Regenerate(seed=4),
    )
    assert isinstance(value.real, float)


def test_none_removes_the_default_of_an_optional_value() -> None:
    """TOML has no null, so optional fields, and only they, take "none"; JSON's null means the same."""
    value, _ = structure({"maybe": "none", "maybe_text": "none", "text": "none"}, Sample)
    assert value is not None
    assert (value.maybe, value.maybe_text, value.text) == (None, None, "none")
    assert structure({"maybe": None}, Sample) == (Sample(maybe=None), [])
    assert problems_of({"whole": "none"}) == {"whole": 'must be an integer, got "none"'}
    assert problems_of({"whole": None}) == {"whole": "must be an integer, got nothing"}


def test_all_faults_come_in_one_report_with_their_paths() -> None:
    """Faults of nested tables and list items are all reported, at their own TOML paths."""
    data = {
        "epochs": 3.7,
        "precision": "fp8",
        "optimizer": {"name": "adam", "lr": -1.0, "wieght_decay": 0.1},
        "learning_rate": {"warmup": 2, "shape": 3},
    }
    assert problems_of(data, ScheduleSection) == {
        "epochs": "must be an integer, got 3.7",
        "precision": 'must be one of "bf16", "fp32", got "fp8"',
        "optimizer.name": """must be one of "adamw", "muon", got "adam"; did you mean 'adamw'?""",
        "optimizer.lr": "must be > 0, got -1.0",
        "optimizer.wieght_decay": "unknown key 'wieght_decay' did you mean 'weight_decay'?",
        "learning_rate.warmup": "must be from 0 to 1, got 2.0",
        "learning_rate.shape": "must be a string, got 3",
    }
    assert problems_of({"suites": [{"name": "a"}, {"name": 3}, {"path": "x"}]}, BenchmarkSection) == {
        "suites[1].name": "must be a string, got 3",
        "suites[2].name": "is missing; it must be a string",
    }


def test_the_message_of_an_attrs_validator_is_kept() -> None:
    """cattrs' transform_error drops it."""

    @attrs.frozen
    class Bounded:
        size: int = attrs.field(default=1, validator=attrs.validators.gt(0))
        kind: str = attrs.field(default="a", validator=attrs.validators.in_(["a", "b"]))

    assert problems_of({"size": 0, "kind": "c"}, Bounded) == {
        "size": "'size' must be > 0: 0",
        "kind": "'kind' must be in ['a', 'b'] (got 'c')",
    }


def test_a_validator_may_read_the_other_fields() -> None:
    """A validator sees an instance with the values and defaults of all fields."""

    def above_low(instance: Any, attribute: Any, value: int) -> None:
        if value < instance.low + len(instance.extra):
            raise ValueError(f"must be at least {instance.low + len(instance.extra)}")

    @attrs.frozen
    class Range:
        high: int = attrs.field(default=9, validator=above_low)
        low: int = 2
        extra: list[int] = attrs.field(factory=lambda: [1])

    assert problems_of({"high": 2}, Range) == {"high": "must be at least 3"}


def test_a_fault_of_a_whole_section_is_reported_at_the_section() -> None:
    """An error of `__attrs_post_init__` has the path of the table."""
    problems = problems_of({"learning_rate": {"shape": "wsd", "warmup": 0.9, "decay": 0.3}}, ScheduleSection)
    assert problems == {"learning_rate": "warmup and decay must sum to at most 1, got 0.9 + 0.3"}


def test_a_bare_string_is_a_suite_of_that_name() -> None:
    """`suites = ["a"]` is short for `suites = [{ name = "a" }]`."""
    value, _ = structure({"suites": ["a", {"name": "b", "take": 2}]}, BenchmarkSection)
    assert value is not None
    assert value.suites == (Suite(name="a"), Suite(name="b", take=2))


def test_a_field_whose_type_has_no_toml_form_is_a_problem_not_a_crash() -> None:
    """A plug-in's config may have fields of any type; the message names the type."""

    @attrs.frozen
    class Odd:
        thing: complex = 0j

    assert "complex" in problems_of({"thing": 1}, Odd)["thing"]
