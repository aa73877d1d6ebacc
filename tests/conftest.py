"""Fixtures that all tests share. Nothing here needs the network."""

from __future__ import annotations

import os
import signal

# Before anything imports transformers: a test that would reach out must fail at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell's background jobs ignore Ctrl-C, and so would everything that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
import torch

from speculators.verifier.tiny import make_tiny_verifier


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that all others run beside it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Tiny tensors gain nothing from more threads, and oversubscribed machines lose much."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random Llama (hidden 32, 4 layers, 320 tokens, tied head), ChatML tokenizer. Read only."""
    return make_tiny_verifier(tmp_path_factory.mktemp("verifier") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the code under test uses instead of the user's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECULATORS_CACHE", str(folder))
    return folder
