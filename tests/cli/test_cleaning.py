"""`spec rm` and `spec cache`: what they list, what they remove, and what they never touch."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Spec

from speculators.errors import ArtifactError
from speculators.files.locks import locked_or_refused
from speculators.files.used import use

STATES, OTHER = "0" * 16, "1" * 16


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """The command line in a folder with two runs and a cache."""
    monkeypatch.chdir(tmp_path)
    made = Spec(tmp_path)
    for name in ("mine-11111111", "mine-22222222"):
        (made.runs / name / "speculator").mkdir(parents=True)
        (made.runs / name / "plan.json").write_text("{}")
        (made.runs / name / "speculator" / "model.safetensors").write_bytes(bytes(1000))
    plan = {
        "recipe": {"name": "mine", "verifier": {"model": "owner/Model-8B"}},
        "stages": [{"name": "capture", "fingerprint": STATES + "f" * 48}],
    }
    (made.runs / "mine-11111111" / "plan.json").write_text(json.dumps(plan))
    for kind, name in (("states", STATES), ("states", OTHER), ("conversations", OTHER), ("verifiers", "tiny-0-v1")):
        (made.cache / kind / name).mkdir(parents=True)
        (made.cache / kind / name / "file").write_bytes(bytes(2000))
    return made


def left(spec: Spec) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in spec.cache.glob("*/[!.]*")}


def test_rm_removes_runs_and_says_what_that_frees(spec: Spec) -> None:
    """A run is named as everywhere; --dry-run only says what would go."""
    outcome = spec("rm", "mine-1", "--dry-run")
    assert (outcome.code, len(list(spec.runs.iterdir()))) == (0, 2)
    assert "would free 1." in outcome.out
    outcome = spec("rm", "mine-1", spec.runs / "mine-22222222", "--yes", "--json")
    assert outcome.code == 0
    assert outcome.json["bytes"] > 2000
    assert list(spec.runs.iterdir()) == []


def test_rm_asks(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal, --yes is needed; any answer but yes removes nothing."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin, code, runs in ((io.StringIO("y\n"), 2, 2), (Terminal("n\n"), 2, 2), (Terminal("y\n"), 0, 1)):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert spec("rm", "mine-1").code == code
        assert len(list(spec.runs.iterdir())) == runs


def test_rm_refuses_a_run_at_work_a_link_and_the_working_folder(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is touched, nor what was named beside it."""
    run = spec.runs / "mine-11111111"
    with locked_or_refused(run, ArtifactError("locked")):
        outcome = spec("rm", "mine-22222222", run, "--yes")
    assert outcome.code == 1
    assert "a launch is working on this run" in outcome.err
    (spec.runs / "link-33333333").symlink_to(run)
    assert spec("rm", "link-3", "--yes").code == 2
    monkeypatch.chdir(run)
    assert spec("rm", run, "--yes").code == 2
    assert (run / "speculator" / "model.safetensors").is_file()
    assert (spec.runs / "mine-22222222").is_dir()


def test_cache_lists_entries_with_the_recipes_and_models_they_serve(spec: Spec) -> None:
    """What an entry is for comes from its marks and from the plans of runs."""
    use(spec.cache / "conversations" / OTHER, "other", "tiny:0")
    listed = spec("cache", "--json").json
    entries = {entry["name"]: entry for entry in listed["entries"]}
    assert listed["bytes"] == 8000
    assert entries[f"states/{STATES}"]["users"] == ["mine", "owner/Model-8B"]
    assert entries[f"conversations/{OTHER}"]["users"] == ["other", "tiny:0"]
    assert "owner/Model-8B" in spec("cache").out


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        (["mine"], {f"states/{STATES}"}),
        (["Model-8B"], {f"states/{STATES}"}),
        (["states"], {f"states/{STATES}", f"states/{OTHER}"}),
        ([f"states/{OTHER}"], {f"states/{OTHER}"}),
        (["--all"], {f"states/{STATES}", f"states/{OTHER}", f"conversations/{OTHER}", "verifiers/tiny-0-v1"}),
        (["--unused-days", "30"], {f"states/{OTHER}"}),
        (["nothing"], set()),
    ],
)
def test_prune_removes_what_was_named(spec: Spec, what: list[str], gone: set[str]) -> None:
    """By recipe, model, kind, entry or age; --dry-run names the same entries and removes none."""
    old = time.time() - 40 * 86_400
    os.utime(spec.cache / "states" / OTHER, (old, old))
    before = left(spec)
    tried = spec("cache", "prune", *what, "--dry-run", "--json").json
    assert left(spec) == before
    assert set(tried["removed"]) == gone
    assert spec("cache", "prune", *what, "--yes").code == 0
    assert left(spec) == before - gone


def test_prune_needs_a_choice(spec: Spec) -> None:
    """A bare `prune` would be a guess at what somebody wants to lose."""
    assert spec("cache", "prune", "--yes").code == 2
    assert spec("cache", "prune", "mine", "--all", "--yes").code == 2
    assert len(left(spec)) == 4


def test_answers_go_with_what_lies_beside_them(spec: Spec) -> None:
    """Their provenance and a half-made file are one entry with them; so is a half-made folder."""
    (spec.cache / "regenerated").mkdir()
    for end in ("", ".json", ".part"):
        (spec.cache / "regenerated" / f"{STATES}.jsonl{end}").write_bytes(bytes(10))
    (spec.cache / "states" / f"{STATES}.partial").mkdir()
    removed = spec("cache", "prune", f"regenerated/{STATES}.jsonl", f"states/{STATES}", "--yes", "--json").json
    assert (len(removed["removed"]), removed["bytes"]) == (2, 2030)
    assert left(spec) == {f"states/{OTHER}", f"conversations/{OTHER}", "verifiers/tiny-0-v1"}


@pytest.fixture
def user(spec: Spec) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses one entry."""
    code = (
        "import sys; from pathlib import Path; from speculators.files.used import use; "
        "use(Path(sys.argv[1]), 'theirs'); print('using', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(spec.cache / "states" / STATES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_prune_keeps_what_a_running_process_uses(spec: Spec, user: subprocess.Popen[str]) -> None:
    """The entry is named as kept; once its process is gone, killed or not, it can be removed."""
    outcome = spec("cache", "prune", "states", "--yes", "--json")
    assert outcome.json["in_use"] == [f"states/{STATES}"]
    assert f"states/{STATES}" in left(spec)
    user.kill()
    user.wait()
    assert spec("cache", "prune", "states", "--yes").code == 0
    assert not {name for name in left(spec) if name.startswith("states/")}


def test_a_cache_that_can_only_be_read_is_used_without_marks(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's cache serves as before; nothing in it is removed by accident."""
    real = Path.open

    def refuse(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if self.suffix == ".use" and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    use(spec.cache / "states" / OTHER, "mine")
    assert not (spec.cache / "states" / f".{OTHER}.use").exists()
    assert spec("cache").code == 0


def test_prune_never_leaves_the_cache(spec: Spec, tmp_path: Path) -> None:
    """Links, and files that the cache does not know, stay; so does what a link leads to."""
    outside = tmp_path / "outside"
    (outside / ("2" * 16)).mkdir(parents=True)
    (outside / ("2" * 16) / "file").write_text("mine")
    (spec.cache / "states" / ("3" * 16)).symlink_to(outside / ("2" * 16))
    (spec.cache / "served").symlink_to(outside)
    (spec.cache / "states" / OTHER / "link").symlink_to(outside)
    (spec.cache / "states" / "notes.txt").write_text("mine")
    assert spec("cache", "prune", "--all", "--yes").code == 0
    assert left(spec) == {f"states/{'3' * 16}", "states/notes.txt", f"served/{'2' * 16}"}
    assert (outside / ("2" * 16) / "file").read_text() == "mine"
