"""What the stages of one run share: where things lie, who listens, and the verifier while it is loaded."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue

import attrs

from speculators.bench.rows import JudgedResponse
from speculators.bench.suites import Prompt, load_suite
from speculators.data.planned import as_planned
from speculators.events import Event, Facts, Listen, StageEvent, WarningEvent
from speculators.files.locks import locked
from speculators.files.used import use
from speculators.recipe.fingerprint import suite_source
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe, Suite
from speculators.runs.places import Places, RunFolder
from speculators.runs.stages import note_made
from speculators.training.world import World
from speculators.verifier.engine import Engine

# A suite's judged responses by the fingerprint of what they follow from.
KeptRows = dict[str, list[JudgedResponse]]


@attrs.define
class StageResult:
    """Filled in by a stage while it works, for the event that ends it."""

    facts: Facts | None = None
    detail: str = ""


@attrs.define(eq=False, kw_only=True)
class Context:
    """One run on one process.

    Attributes:
        folder: of the verifier.
        listen: gets every event, on rank 0 only.
        verify: hash all stored states before they are used, not each when it is first read.
        rows: the verifier's own responses by (suite, temperature), so that evaluation and benchmark share them.
        kept: the same responses by everything that they follow from; runs of one process may share it.
    """

    recipe: Recipe
    plan: Plan
    folder: Path
    places: Places
    world: World
    listen: Listen
    verify: bool = False
    kept: KeptRows = attrs.field(factory=dict)
    rows: dict[tuple[str, float], list[JudgedResponse]] = attrs.field(init=False, factory=dict)
    _engines: dict[str, Engine] = attrs.field(init=False, factory=dict)
    _warnings: SimpleQueue[str] = attrs.field(init=False, factory=SimpleQueue)

    @property
    def run_folder(self) -> RunFolder:
        """Where this run keeps its files."""
        return self.places.run(self.plan)

    @property
    def shares_verifier(self) -> bool:
        """Whether the processes hold one copy of the verifier together."""
        return self.world.size > 1 and self.recipe.distributed.shard_verifier

    def engine(self, dtype: str) -> Engine:
        """Loads the verifier in `dtype`, unless it is loaded; one in another dtype is freed first.

        Where processes share it, all of them call this, and compute in `Engine.together`.
        """
        if dtype not in self._engines:
            self.free_engine()
            self._engines[dtype] = Engine(
                self.folder,
                dtype=dtype,
                device=self.world.device,
                section=self.recipe.verifier,
                group=self.world.control if self.shares_verifier else None,
            )
        return self._engines[dtype]

    @contextmanager
    def lead(self, dtype: str) -> Iterator[Engine | None]:
        """Gives the verifier to rank 0 for the block, and None to the others, which follow if they share it."""
        engine = self.engine(dtype) if self.world.is_main or self.shares_verifier else None
        with nullcontext() if engine is None else engine.together():
            yield engine if self.world.is_main else None

    def prompts(self, suite: Suite) -> list[Prompt]:
        """Reads one of the recipe's suites; raises DataError if its files changed since the plan was made."""
        planned = self.plan.stage("prepare").inputs["held_out"]
        with as_planned(suite_source(suite), planned[self.recipe.benchmark.suites.index(suite)]):
            return load_suite(suite)

    def free_engine(self) -> None:
        """Drops the verifier, so that training has its memory."""
        self._engines.clear()
        # A sharded one keeps itself alive in reference cycles.
        gc.collect()

    def use_cache(self) -> None:
        """Marks what this run reads from the cache, or makes there, so that nobody removes it while the run works."""
        if not self.world.is_main:
            return
        users = (self.recipe.name, self.recipe.verifier.model)
        prints = self.plan.fingerprints()
        use(self.places.prepared(self.plan), *users)
        if self.recipe.data.regenerate is not None:
            use(self.places.answers(prints["prepare"]), *users)
        if "capture" in prints and self.recipe.data.store is None:
            use(self.places.states(prints["capture"]), *users)
        if self.folder.is_relative_to(self.places.verifiers / "verifiers"):
            use(self.folder, *users)

    def emit(self, event: Event) -> None:
        """Passes any event on, from rank 0, after the warnings of other threads."""
        while not self._warnings.empty():
            self._pass_on(WarningEvent(message=self._warnings.get()))
        self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        if self.world.is_main:
            self.listen(event)

    def warn_later(self, message: str) -> None:
        """Takes a warning from any thread; it is passed on with the next event, because listeners want one thread."""
        self._warnings.put(message)

    @contextmanager
    def alone(self, folder: Path, stage: str) -> Iterator[None]:
        """Keeps other runs off a folder of the cache: runs with two seeds make the same states in one place."""
        if not self.world.is_main:
            yield
            return
        with locked(self.places.lock_of(stage, folder), self.emit, stage=stage):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[StageResult]:
        """Reports that a stage starts and, with the result that the block fills in, that it is done."""
        began = time.monotonic()
        self.emit(StageEvent(stage=name, status="start"))
        result = StageResult()
        yield result
        seconds = time.monotonic() - began
        self.emit(StageEvent(stage=name, status="done", detail=result.detail, facts=result.facts, seconds=seconds))

    def skip(self, name: str, why: str) -> None:
        """Reports that a stage is not run, and why."""
        self.emit(StageEvent(stage=name, status="skip", detail=why))

    def note_files(self, stage: str, files: Mapping[str, str]) -> None:
        """Records in the run folder the sha256 of each file that a stage made in the cache."""
        # `spec data` prepares a run's data when there is no run folder yet.
        if self.world.is_main and self.run_folder.path.is_dir():
            note_made(self.run_folder, self.plan.stage(stage), files)
