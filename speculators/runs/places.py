"""The layout of run folders and of the cache: the one module that knows where everything lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError, Problem, RecipeError
from speculators.files.disk import cache_folder, read_json
from speculators.recipe import lock
from speculators.recipe.catalog import recipe_names, recipe_path
from speculators.recipe.plan import Plan
from speculators.registry import near_miss

# Where runs are kept unless --runs says otherwise, relative to the working folder.
RUNS = Path("runs")

# The mark of a re-run in its folder.
RERUN = "reproduces.json"
# Fingerprints are cut to this many characters in names: folders of the cache, and files of benchmarks.
_FOLDER_DIGITS, _FILE_DIGITS = 16, 8


@attrs.frozen
class RunFolder:
    """The files of one run by what they hold; any of them may be missing.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @classmethod
    def around(cls, speculator: Path) -> RunFolder | None:
        """Finds the run that a speculator's folder lies in; None for a speculator outside of runs."""
        run = cls(speculator.absolute().parent)
        return run if speculator.absolute().name == run.speculator.name and run.is_known else None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def is_known(self) -> bool:
        """Whether a run left its plan or its lock here."""
        return self.plan.is_file() or self.lock.is_file()

    @property
    def is_rerun(self) -> bool:
        """Whether `spec reproduce` made this folder: it holds a run of its own, and what that was compared with."""
        return (self.path / RERUN).is_file()

    @property
    def recipe(self) -> Path:
        """The recipe that was run, overrides and what it extends included; of older runs, its author's file."""
        return self.path / "recipe.toml"

    @property
    def plan(self) -> Path:
        """The resolved plan; `recipe.plan.read_plan` reads it."""
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        """Everything that determines the result; `Lock.read` reads it from the folder."""
        return self.path / lock.NAME

    @property
    def events(self) -> Path:
        """Every event but progress, one JSON object per line."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds one folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def speculator(self) -> Path:
        """The exported, servable model."""
        return self.path / "speculator"

    @property
    def trained(self) -> Path:
        """Written last by training: which checkpoint was exported, and the sha256 of each exported file."""
        return self.path / "train.json"

    @property
    def made(self) -> Path:
        """The sha256 of what earlier stages made in the cache, which may be deleted before it is compared."""
        return self.path / "made.json"

    @property
    def bench(self) -> Path:
        """Holds the benchmarks made in process."""
        return self.path / "bench"

    @property
    def served(self) -> Path:
        """Holds the benchmarks of running servers."""
        return self.bench / "served"

    @property
    def audits(self) -> Path:
        """Holds the audits of running servers."""
        return self.bench / "audits"

    @property
    def tuned(self) -> Path:
        """The file with the K that `spec tune` chose for decoding in process."""
        return self.path / "tune.json"

    @property
    def tuned_for_servers(self) -> Path:
        """The file with the K that `spec tune` chose for each batch size of servers."""
        return self.path / "tune-served.json"

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.path / "report.html"

    def benchmark(self, fingerprint: str) -> Path:
        """The result of the stage `bench` with this fingerprint."""
        return self.bench / f"{fingerprint[:_FILE_DIGITS]}.json"

    def requested_benchmark(self, fingerprint: str) -> Path:
        """The result of a `spec bench` whose settings have this fingerprint."""
        return self.bench / f"asked-{fingerprint[:_FILE_DIGITS]}.json"

    def served_benchmark(self, engine: str, version: str, fingerprint: str) -> Path:
        """The result of a server's benchmark whose settings have this fingerprint."""
        return self.served / f"{engine}-{version}-{fingerprint[:_FILE_DIGITS]}.json"

    def audit(self, engine: str, version: str, fingerprint: str) -> Path:
        """The audit of a server with these prompts."""
        return self.audits / f"{engine}-{version}-{fingerprint[:_FILE_DIGITS]}.json"


@attrs.frozen(kw_only=True)
class Places:
    """Where runs keep what they make.

    Attributes:
        runs: holds one folder per run.
        resumed: a run to go on with wherever its folder lies, as long as the plan trains the same.
        cache: holds what runs share: prepared conversations and hidden states, each under its stage's fingerprint.
        verifiers: cache of converted verifiers; `cache` unless it is set, because they are input and not output.
    """

    runs: Path = RUNS
    resumed: RunFolder | None = None
    cache: Path = attrs.field(factory=cache_folder)
    verifiers: Path = attrs.field()

    @verifiers.default
    def _beside(self) -> Path:
        return self.cache

    def run(self, plan: Plan) -> RunFolder:
        """The run of this plan."""
        if self.resumed is not None and trains(self.resumed) == plan.stage("train").fingerprint:
            return self.resumed
        return RunFolder(self.runs / plan.run_name)

    def prepared(self, plan: Plan) -> Path:
        """The prepared conversations of this plan."""
        return self.conversations(plan.stage("prepare").fingerprint)

    def conversations(self, fingerprint: str) -> Path:
        """The prepared conversations of the stage `prepare` with this fingerprint."""
        return self.cache / "conversations" / fingerprint[:_FOLDER_DIGITS]

    def states(self, fingerprint: str) -> Path:
        """The hidden states of the stage `capture` with this fingerprint."""
        return self.cache / "states" / fingerprint[:_FOLDER_DIGITS]

    @staticmethod
    def uploaded_states(store: str, fingerprint: str) -> str:
        """The URL of the hidden states of the stage `capture` with this fingerprint, under a recipe's `data.store`."""
        return f"{store.rstrip('/')}/{fingerprint[:_FOLDER_DIGITS]}"

    def answers(self, fingerprint: str) -> Path:
        """The verifier's own answers that the stage `prepare` with this fingerprint reads, as JSONL."""
        return self.cache / "regenerated" / f"{fingerprint[:_FOLDER_DIGITS]}.jsonl"

    def from_server(self, fingerprint: str) -> Path:
        """The folder in which a server leaves states for us, by what the server was started with.

        It lies beside the verifiers, which a re-run shares with its run, so that one server can serve both.
        """
        return self.verifiers / "served" / fingerprint[:_FOLDER_DIGITS]

    def lock_of(self, stage: str, folder: Path) -> Path:
        """The name to lock while a stage works on a folder that runs share."""
        return self.cache / "locks" / f"{stage}-{folder.name}"


def trains(run: RunFolder) -> str | None:
    """Reads the fingerprint of what a run trains, from its lock; None where that cannot be read."""
    values = read_json(run.lock)
    prints = values.get("fingerprints") if isinstance(values, dict) else None
    return prints.get("train") if isinstance(prints, dict) else None


def run_folders(runs: Path) -> list[RunFolder]:
    """Lists the runs in a folder by name."""
    folders = (RunFolder(path) for path in sorted(runs.glob("*")))
    return [run for run in folders if run.is_known or run.events.is_file()]


def find_run(text: str | Path, runs: Path = RUNS) -> RunFolder:
    """Finds a run by the path of its folder, by its name in `runs`, or by the beginning of one name only.

    Raises:
        RecipeError: there is no such run, or there are several, which it lists.
    """
    run = RunFolder(_home_expanded(text))
    if run.is_known or run.events.is_file():
        return run
    if run.path.exists() and (run.path.is_file() or "/" in str(text)):
        raise _no_run(text, "is not a run: it has neither plan.json nor events.jsonl", "spec ls lists the runs")
    runs_here = {each.name: each for each in run_folders(runs)}
    if matching := _matching(str(text), list(runs_here)):
        if len(matching) > 1:
            raise _no_run(text, f"is the beginning of {len(matching)} runs: {', '.join(matching)}", "give one of them")
        return runs_here[matching[0]]
    hint = near_miss(str(text), list(runs_here)) or "spec ls lists the runs, and a path such as ./X names any folder"
    raise _no_run(text, "is not a run" if run.path.exists() else f"there is no such run, in {runs} or as a path", hint)


def _matching(text: str, names: list[str]) -> list[str]:
    """Picks the names that a text stands for: itself, else those of the recipe of that name, else all that begin so."""
    ways = (
        [name for name in names if name == text],
        [name for name in names if name.rpartition("-")[0] == text],
        [name for name in names if text and name.startswith(text)],
    )
    return next((way for way in ways if way), [])


def _home_expanded(text: str | Path) -> Path:
    """Expands ~; an unknown user's stays, and is reported as a path that does not exist."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _no_run(text: str | Path, fault: str, hint: str) -> RecipeError:
    return RecipeError([Problem("", f"{text}: {fault}", hint)])


def find_recipe(text: str, runs: Path = RUNS) -> Path | RunFolder:
    """Finds what a verb that takes a recipe was asked for: a recipe's file, or a run.

    A shipped recipe comes before a run whose name begins with its name; `runs/NAME` always means the run.

    Raises:
        RecipeError: there is neither; or several runs match.
    """
    is_name = "/" not in text and not text.endswith(".toml")
    run = RunFolder(_home_expanded(text))
    if is_name and text in recipe_names():
        return recipe_path(text)
    if run.is_known:
        return run
    if is_name and (matching := _matching(text, [each.name for each in run_folders(runs)])):
        return find_run(text if len(matching) > 1 else runs / matching[0], runs)
    return recipe_path(text)


def find_speculator(folder: Path, runs: Path = RUNS) -> Path:
    """Finds the speculator of a run, named as `find_run` reads it, or a folder that is a speculator itself.

    Raises:
        ArtifactError: there is none yet.
        RecipeError: there is no such folder or run.
    """
    for place in (RunFolder(folder).speculator, folder):
        if (place / "config.json").is_file():
            return place
    if folder.is_dir() and not RunFolder(folder).is_known:
        raise _no_run(folder, "neither a run with a speculator nor a speculator", "spec ls lists the runs")
    run = find_run(folder, runs)
    if (run.speculator / "config.json").is_file():
        return run.speculator
    raise ArtifactError(f"{run.path}: it has no speculator yet", hint=f"spec run {run.path} goes on with its training")


def recipe_of(speculator: Path) -> dict[str, Any] | None:
    """Reads the recipe of the run that a speculator's folder is in; None outside of runs.

    Raises:
        ArtifactError: the run's plan.json is damaged.
    """
    run = RunFolder.around(speculator)
    if run is None or not run.plan.is_file():
        return None
    try:
        return dict(json.loads(run.plan.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "run its recipe again with spec run to write it anew"
        raise ArtifactError(f"{run.plan}: damaged: {error!r}", hint=hint) from error
