"""Whatever a config.json lacks or holds: a plan is made, or an error names file and key; never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facts import FIXTURES
from transformers import CONFIG_MAPPING
from verifier.families import VALUES, config_of

from speculators.cost.sizes import verifier_cost
from speculators.errors import RecipeError, SpeculatorsError
from speculators.facts import PLAIN_HEAD_DIM, PLAIN_KEY_HEADS, PLAIN_ROPE, VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan
from speculators.verifier.supported import check_architecture

MISSING = object()
PUBLISHED = ("llama-3.1-8b", "gpt-oss-20b")
TINY = ("Gemma 3 (4B, 12B, 27B)", "Gemma 4 (26B-A4B)", "DeepSeek-V3.2", "Qwen3-Next")
FAST = ("llama-3.1-8b", "Gemma 4 (26B-A4B)")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*PUBLISHED, *TINY)]


def outcome(raw: dict[str, Any]) -> str:
    """Plans with a config.json and builds its architecture; returns the error's text, or ""."""
    try:
        facts = VerifierFacts(raw, "some/config.json")
        make_plan(load_recipe("smoke", ["data.max_tokens = 64", 'algorithm.draft_vocab_size = "none"']), facts)
        check_architecture(facts)
        verifier_cost(facts)
    except SpeculatorsError as error:
        return str(error)
    return ""


def changed(raw: dict[str, Any], values: tuple[Any, ...]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields the config with each key of it, also of its text model, replaced by each value."""
    tables = [(), ("text_config",)] if "text_config" in raw else [()]
    for table in tables:
        for key in raw["text_config"] if table else raw:
            for value in values:
                other = copy.deepcopy(raw)
                inner = other["text_config"] if table else other
                if value is MISSING:
                    del inner[key]
                else:
                    inner[key] = value
                yield key, value, other


def published(name: str) -> dict[str, Any]:
    if name in VALUES:
        return dict(json.loads(config_of(name).to_json_string(use_diff=True)))
    raw = dict(json.loads((FIXTURES / name / "config.json").read_text()))
    # Two layers: each of many configs is built.
    kinds = {"layer_types": raw["layer_types"][:2]} if "layer_types" in raw else {}
    return {**raw, "num_hidden_layers": 2, **kinds}


@pytest.mark.parametrize("name", EACH)
def test_no_value_of_a_config_ends_in_a_traceback(name: str) -> None:
    """Each key in turn missing, null, or a string: success, or an error that names the file."""
    raw = published(name)
    assert outcome(raw) == ""
    for key, value, other in changed(raw, (MISSING, None, "0.0")):
        text = outcome(other)
        assert text == "" or "config.json" in text, (key, value, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_no_kind_of_value_of_a_config_ends_in_a_traceback(name: str) -> None:
    """As above with further kinds of values."""
    for key, value, other in changed(published(name), ([1], [], {}, {"a": 1}, True, -1, 0, 1.5, "x")):
        text = outcome(other)
        assert text == "" or "config.json" in text, (key, value, text)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("attention_dropout", "0.0", "attention_dropout"),
        ("num_attention_heads", "32", "num_attention_heads must be an integer > 0, got '32'"),
        ("architectures", "LlamaForCausalLM", "architectures must be a list of strings, got 'LlamaForCausalLM'"),
        ("num_experts_per_tok", "2", "num_experts_per_tok must be an integer >= 0, or a list of them, got '2'"),
        ("model_type", "gpt_9", "does not know the model_type 'gpt_9'"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, text: str) -> None:
    """The message has the file, the key and the value, on one line of its own, without a list of classes."""
    message = outcome({**published("llama-3.1-8b"), key: value})
    assert text in message
    assert "some/config.json" in message
    assert len(message) < 400


def test_a_config_without_architectures_can_be_planned() -> None:
    """Nothing but the exported config names the class, and servers do not need it."""
    raw = published("llama-3.1-8b")
    del raw["architectures"]
    assert outcome(raw) == ""


def test_plain_families_are_those_of_transformers() -> None:
    """What light commands derive without transformers is what its classes derive."""
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2}
    for kind in {*PLAIN_HEAD_DIM, *PLAIN_KEY_HEADS, *PLAIN_ROPE}:
        raw = {"model_type": kind, **sizes, "rope_theta": 123.0, "num_key_value_heads": 3}
        if kind in PLAIN_KEY_HEADS:
            del raw["num_key_value_heads"]
        theirs = CONFIG_MAPPING[kind].from_dict(raw)
        if kind in PLAIN_HEAD_DIM:
            assert getattr(theirs, "head_dim", None) in (None, 16), kind
        if kind in PLAIN_KEY_HEADS:
            assert theirs.num_key_value_heads == 6, kind
        if kind in PLAIN_ROPE:
            assert theirs.rope_parameters == VerifierFacts(raw).rope_parameters, kind


def test_gemma_3s_published_config_has_its_classs_vocabulary_and_positions() -> None:
    """The multimodal Gemma 3 files name neither: they are the defaults of Gemma3TextConfig."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    facts = VerifierFacts({"model_type": "gemma3", "text_config": text})
    assert (facts.vocab_size, facts.max_position_embeddings, facts.head_dim) == (262_208, 131_072, 256)
    assert set(facts.rope_parameters) == {"full_attention", "sliding_attention"}


def test_llama_2s_rotary_embedding_is_its_classs() -> None:
    """Llama 2's file has no rope_theta."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    facts = VerifierFacts({"model_type": "llama", **sizes})
    assert facts.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_a_size_that_a_class_has_by_default_is_not_derived_from_others() -> None:
    """Qwen3's heads have 128 values whatever hidden_size says, and Mistral has 8 key heads: a file may omit both."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2}
    assert VerifierFacts({"model_type": "qwen3", **sizes}).head_dim == 128
    assert VerifierFacts({"model_type": "mistral", **sizes}).num_key_value_heads == 8


def test_an_unsupported_family_is_an_error_of_the_recipe(tmp_path: Path, spec: Any) -> None:
    """`plan` and `validate` refuse it with exit code 2 and a sentence, before anything is downloaded."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_of("Llama 2, 3").to_dict(), "model_type": "phi"}))
    for verb in ("plan", "validate"):
        sizes = ("--set", "data.max_tokens=64", "--set", "algorithm.draft_vocab_size=64")
        done = spec(verb, "smoke", "--verifier-config", path, *sizes)
        assert done.code == RecipeError.exit_code
        assert "the final norm LayerNorm is neither an RMSNorm nor a LayerNorm without bias" in done.err
        assert len(done.err.splitlines()) < 5
