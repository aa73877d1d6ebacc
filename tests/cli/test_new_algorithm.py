"""`spec new-algorithm` writes the code of the guide beside the algorithms, and that code works."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from command import Spec

from speculators.cli.new_algorithm import skeleton

# Starting torch and running all stages takes a while on a busy machine.
TIMEOUT = 240


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """The command line in a folder of this test."""
    return Spec(tmp_path)


@pytest.mark.slow
def test_the_guides_own_example_passes_its_own_test(tmp_path: Path, spec: Spec) -> None:
    """In a process without this repository's fixtures, relay trains, saves, loads and is benchmarked."""
    result = spec("new-algorithm", "relay", "--into", tmp_path / "mine", "--json")
    assert result.code == 0, result.err
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", result.json["test"]],
        cwd=tmp_path / "mine",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_another_name_is_written_everywhere() -> None:
    """No trace of the example remains, and every Python file parses."""
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
    """A second call names the existing files and writes nothing."""
    assert spec("new-algorithm", "mine", "--into", tmp_path / "a").code == 0
    (tmp_path / "a" / "mine.toml").unlink()
    result = spec("new-algorithm", "mine", "--into", tmp_path / "a")
    assert result.code == 2
    assert "mine/core.py" in result.err
    assert not (tmp_path / "a" / "mine.toml").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Mine", "cannot be the name of a package"),
        ("class", "cannot be the name of a package"),
        ("a-b", "cannot be the name of a package"),
        ("medusa", "an algorithm 'medusa' exists already"),
        ("queue", "a module 'queue' exists already"),
        ("torch", "imported instead of yours"),
    ],
)
def test_an_unusable_name_is_refused(name: str, word: str, tmp_path: Path, spec: Spec) -> None:
    """The error comes before anything is written."""
    result = spec("new-algorithm", name, "--into", tmp_path / "b")
    assert result.code == 2
    assert word in result.err
    assert not (tmp_path / "b").exists()
