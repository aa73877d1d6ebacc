"""A recipe to vary, in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from speculators.config import CONFIGS
from speculators.facts import VerifierFacts

FIXTURES = Path(__file__).parents[1] / "fixtures"

MINIMAL = """\
format = 1
name = "mine"
version = "1.0.0"

[verifier]
model = "owner/model"
revision = "abc"

[data]
sources = [{ path = "rows.jsonl" }]
max_tokens = 256

[algorithm]
name = "eagle3"
draft_vocab_size = 64

[schedule]
tokens_per_step = 1024
optimizer = { name = "adamw", lr = 1e-3 }

[benchmark]
suites = [{ name = "held", path = "rows.jsonl", split = "test" }]
num_speculative_tokens = [3, 5]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a recipe and its data into the working folder, as the minimal recipe with pairs of texts replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')

    def make(*changes: tuple[str, str], name: str = "mine.toml", text: str = MINIMAL) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return f"./{name}"

    return make


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes, after the test, what it registered."""
    monkeypatch.setattr(CONFIGS, "_things", dict(CONFIGS._things))


@pytest.fixture
def llama() -> VerifierFacts:
    """The facts of Llama-3.1-8B-Instruct."""
    return VerifierFacts.read(FIXTURES / "llama-3.1-8b" / "config.json")


@pytest.fixture
def qwen() -> VerifierFacts:
    """The facts of Qwen3-8B."""
    return VerifierFacts.read(FIXTURES / "qwen3-8b" / "config.json")
