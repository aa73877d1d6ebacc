"""`eagle3_gpt_oss_20b` prepares real conversations with a template of gpt-oss's kind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from chat_templates import KINDS

from speculators.data.prepare import loss_warnings, prepare
from speculators.errors import RecipeError
from speculators.facts import VerifierFacts
from speculators.pipeline import setup
from speculators.recipe.catalog import recipes_folder
from speculators.recipe.load import load_recipe
from speculators.recipe.shipped import shipped_facts
from speculators.runs.places import Places
from speculators.training.world import World

CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
MODERN = [
    {
        "id": "tools",
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": None, "reasoning": "I look it up.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny.", "reasoning": "So it is."},
        ],
    },
    {
        "id": "several",
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "First.", "reasoning_content": "Hm."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Second."},
        ],
    },
]


def test_the_recipe_prepares_real_conversations(tmp_path: Path) -> None:
    """No conversation is lost, with reasoning, tools or neither, and every answer ends as gpt-oss ends it."""
    (tmp_path / "modern.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MODERN))
    real = recipes_folder() / "data" / "quickstart.jsonl"
    sources = f"data.sources=[{{path='{real}', take=30}}, {{path='{tmp_path / 'modern.jsonl'}'}}]"
    recipe = load_recipe("eagle3_gpt_oss_20b", [sources, "benchmark.suites=[]"])
    tokenizer = KINDS["harmony"].tokenizer()
    prepared = prepare(recipe.data, folder=tmp_path / "out", tokenizer=tokenizer, vocab_size=384, base=tmp_path)
    assert (prepared.conversations, prepared.skipped, loss_warnings(prepared)) == (32, {}, [])
    assert prepared.ids()[30:] == ["tools", "several#1", "several#2"]
    ends = {tokenizer.convert_ids_to_tokens(token) for token in prepared.turn_ends}
    assert ends == {"<|return|>", "<|call|>"}
    tools = prepared.row(30)
    runs = np.flatnonzero(np.diff(np.concatenate([[False], tools.loss_mask, [False]])))
    call, answer = (tokenizer.decode(tools.input_ids[a:b]) for a, b in zip(runs[::2], runs[1::2], strict=True))
    assert call.startswith("<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant to=functions.weather")
    assert answer.endswith("<|end|><|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>")


def test_a_missing_package_is_named_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss has MXFP4 weights, which need accelerate: the extra that brings it is named while nothing is spent."""
    recipe = load_recipe("eagle3_gpt_oss_20b")
    shipped = shipped_facts(recipe.verifier)
    assert shipped is not None
    # The shipped facts leave out how the weights are stored.
    facts = VerifierFacts({**shipped.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}, shipped.source)
    monkeypatch.setattr(setup, "fetch_facts", lambda section: facts)
    monkeypatch.setattr(setup, "obtain", lambda *_, **__: pytest.fail("the verifier was downloaded"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    places = Places(runs=tmp_path / "runs", cache=tmp_path / "cache")
    with pytest.raises(RecipeError, match=r"which only accelerate reads[\s\S]*spec-recipes\[quickstart\]"):
        setup.make_context(recipe, places, World(), lambda event: None)
