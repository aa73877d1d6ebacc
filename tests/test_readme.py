"""README.md: every command that it prints is one that the command line takes, and every file that it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from speculators.cli import verb_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("spec ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the parser of its verb, beside a config.json: a verb or an option that is renamed is renamed here, too."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    _, verb, *arguments = shlex.split(command, comments=True)
    verb_parser(verb)[1].parse_args(arguments)


def test_each_door_leads_through_commands() -> None:
    """Serving, research and clusters: the links at the top go to sections that show what to type."""
    doors = re.findall(r"\*\*\[[^]]*\]\(#([\w-]+)\)\*\*", README)
    assert len(doors) == 3
    parts = re.split(r"^## (.*)\n", README, flags=re.MULTILINE)[1:]
    sections = {title.lower().replace(" ", "-"): text for title, text in zip(parts[::2], parts[1::2], strict=True)}
    assert all("```bash" in sections[door] for door in doors)


def test_every_file_that_is_named_exists() -> None:
    """Guides and notebooks, by their paths from the repository's root."""
    paths = set(re.findall(r"`([\w./-]+/[\w-]+\.(?:md|ipynb|py))`", README))
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
