"""The guide beside the algorithms is what `spec new-algorithm` writes, and what it writes works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from command import Spec

from speculators.cli.new_algorithm import skeleton

# A test's process starts torch and runs all stages: seconds, but not one.
TIMEOUT = 240


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """The command, at home in a folder of this test."""
    return Spec(tmp_path)


@pytest.mark.slow
def test_the_guides_own_example_passes_its_own_test(tmp_path: Path, spec: Spec) -> None:
    """Written as relay, in a process without this repository's fixtures: it trains, saves, loads, is benchmarked."""
    told = spec("new-algorithm", "relay", "--into", tmp_path / "mine", "--json")
    assert told.code == 0, told.err
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", told.json["test"]],
        cwd=tmp_path / "mine",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_another_name_is_written_everywhere() -> None:
    """No trace of the example is left, and every file is Python that parses, or the recipe."""
    files = skeleton("two_words")
    assert sorted(files) == [
        "test_two_words.py",
        "two_words.toml",
        "two_words/__init__.py",
        "two_words/config.py",
        "two_words/core.py",
    ]
    assert not any("relay" in text.lower() for text in files.values())
    assert "class TwoWordsDraftModel" in files["two_words/core.py"]
    for name, text in files.items():
        if name.endswith(".py"):
            ast.parse(text)
    marked = {name for name, text in files.items() if "CHANGE" in text}
    assert marked == {"two_words.toml", "two_words/core.py"}


def test_nothing_is_overwritten(tmp_path: Path, spec: Spec) -> None:
    """A second call names what is there and writes nothing."""
    assert spec("new-algorithm", "mine", "--into", tmp_path / "a").code == 0
    (tmp_path / "a" / "mine.toml").unlink()
    told = spec("new-algorithm", "mine", "--into", tmp_path / "a")
    assert told.code == 2
    assert "mine/core.py" in told.err
    assert not (tmp_path / "a" / "mine.toml").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Mine", "no name"),
        ("class", "no name"),
        ("a-b", "no name"),
        ("medusa", "already"),
        ("queue", "there is a module 'queue' already"),
        ("torch", "imported instead of yours"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, word: str, tmp_path: Path, spec: Spec) -> None:
    """Before anything is written."""
    told = spec("new-algorithm", name, "--into", tmp_path / "b")
    assert told.code == 2
    assert word in told.err
    assert not (tmp_path / "b").exists()
