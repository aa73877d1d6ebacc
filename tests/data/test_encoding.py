"""Encoding in several processes: the same rows in the same order, and faults that are met as in one process."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from data_toys import VOCAB, row, section, some_rows

from speculators.data import encoding
from speculators.data.encoded import Conversations
from speculators.data.prepare import prepare
from speculators.errors import DataError
from speculators.verifier.tiny import make_byte_tokenizer

HERE = os.getpid()


@pytest.fixture
def processes(monkeypatch):
    """Sets the number of cores; the first few conversations are encoded alone, and batches are small."""

    def use(cores: int) -> None:
        monkeypatch.setattr(encoding, "usable_cpus", lambda: cores)

    monkeypatch.setattr(encoding, "ALONE", 5)
    monkeypatch.setattr(encoding, "BATCH", 3)
    return use


@pytest.fixture
def rows(jsonl):
    """Conversations of which some cannot be used, among those of other processes, too."""
    late = row("q" * 200, "late", id="late")
    return section(jsonl([*some_rows(17), late, *some_rows(12), row("question"), *some_rows(5)]), max_tokens=80)


def run(data, folder, tokenizer) -> Conversations:
    return prepare(data, folder=folder, tokenizer=tokenizer, vocab_size=VOCAB, base=folder)


def test_files_do_not_depend_on_the_number_of_processes(processes, rows, tokenizer, tmp_path):
    """One process and three write the same files, byte for byte, and count the same."""
    made = []
    for cores in (1, 3):
        processes(cores)
        made.append(run(rows, tmp_path / str(cores), tokenizer))
    one, three = made
    assert one.fingerprint == three.fingerprint
    for name, record in one.manifest["files"].items():
        assert three.manifest["files"][name]["sha256"] == record["sha256"]
    assert one.skipped == three.skipped == {"no supervised token within max_tokens": 1, "no assistant turn": 1}


class Foreign:
    """A tokenizer's companion that only the process that made it can read."""

    def __reduce__(self):
        return _read_by, (HERE,)


def _read_by(process: int) -> Foreign:
    if os.getpid() != process:
        raise ImportError("only known there")
    return Foreign()


@pytest.mark.parametrize("companion", [Foreign(), threading.Lock()], ids=["unreadable", "unpicklable"])
def test_a_tokenizer_that_no_other_process_can_read_works_in_this_one(processes, rows, tokenizer, tmp_path, companion):
    """A tokenizer that cannot travel gives the same rows as one that can."""
    processes(2)
    alone = make_byte_tokenizer(VOCAB)
    alone.companion = companion
    assert run(rows, tmp_path / "alone", alone).fingerprint == run(rows, tmp_path / "both", tokenizer).fingerprint


def test_a_killed_process_is_reported(processes, rows, tokenizer, tmp_path, monkeypatch):
    """A process that dies ends the stage with its exit code, and leaves no folder and no process."""
    processes(2)
    started = []

    def start():
        process = original()
        started.append(process[1])
        process[1].send_signal(signal.SIGKILL)
        return process

    original = encoding._start
    monkeypatch.setattr(encoding, "_start", start)
    with pytest.raises(DataError, match="ended with code -9"):
        run(rows, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    assert [process.poll() for process in started] == [-9, -9]
