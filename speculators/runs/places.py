"""The layout of run folders and of the cache: the one module that knows where everything lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from speculators.errors import ArtifactError
from speculators.files.disk import cache_folder
from speculators.recipe import lock
from speculators.recipe.plan import Plan

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
    def recipe(self) -> Path:
        """The recipe as its author wrote it, before overrides."""
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


@attrs.frozen(kw_only=True)
class Places:
    """Where runs keep what they make.

    Attributes:
        runs: holds one folder per run.
        cache: holds what runs share: prepared conversations and hidden states, each under its stage's fingerprint.
        verifiers: cache of converted verifiers; `cache` unless it is set, because they are input and not output.
    """

    runs: Path = Path("runs")
    cache: Path = attrs.field(factory=cache_folder)
    verifiers: Path = attrs.field()

    @verifiers.default
    def _beside(self) -> Path:
        return self.cache

    def run(self, plan: Plan) -> RunFolder:
        """The run of this plan."""
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


def find_speculator(folder: Path) -> Path:
    """Finds the speculator in a run folder, or in a folder that is a speculator itself.

    Raises:
        ArtifactError: there is none.
    """
    for place in (RunFolder(folder).speculator, folder):
        if (place / "config.json").is_file():
            return place
    raise ArtifactError(f"{folder}: neither a run with a speculator nor a speculator", hint="spec ls lists the runs")


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
