"""What every stage of one run shares: where things are kept, who listens, and the verifier while it is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from speculators.bench.rows import Row
from speculators.data.files import disk_errors
from speculators.events import Event, ProgressEvent, StageEvent, to_json
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe
from speculators.training.world import World
from speculators.verifier.cache import locked
from speculators.verifier.engine import Engine
from speculators.verifier.sources import cache_folder

Listen = Callable[[Event], None]


@attrs.frozen(kw_only=True)
class Places:
    """Where a run keeps what it makes.

    Attributes:
        runs: holds one folder a run.
        cache: holds what runs share: prepared conversations, hidden states.
        verifiers: cache of converted verifiers; the same unless it is told, for they are input and not output.
    """

    runs: Path = Path("runs")
    cache: Path = attrs.field(factory=cache_folder)
    verifiers: Path = attrs.field()

    @verifiers.default
    def _beside(self) -> Path:
        return self.cache

    def prepared(self, plan: Plan) -> Path:
        """Returns the folder of the prepared conversations."""
        return self.cache / "conversations" / plan.stage("prepare").fingerprint[:16]

    def states(self, plan: Plan) -> Path:
        """Returns the folder of the cached hidden states."""
        return self.cache / "states" / plan.stage("capture").fingerprint[:16]

    def run(self, plan: Plan) -> Path:
        """Returns the run folder."""
        return self.runs / plan.run_name


@attrs.define(eq=False, kw_only=True)
class Context:
    """One run on one process.

    Attributes:
        folder: of the verifier.
        listen: gets every event, on rank 0 only.
        rows: the verifier's own responses by (suite, temperature): evaluation and benchmark read the same.
    """

    recipe: Recipe
    plan: Plan
    folder: Path
    places: Places
    world: World
    listen: Listen
    rows: dict[tuple[str, float], list[Row]] = attrs.field(init=False, factory=dict)
    _engines: dict[str, Engine] = attrs.field(init=False, factory=dict)

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        return self.places.run(self.plan)

    def engine(self, dtype: str) -> Engine:
        """Returns the verifier in `dtype`; loading it in another one lets the earlier go."""
        if dtype not in self._engines:
            self._engines.clear()
            trust = self.recipe.verifier.trust_remote_code
            self._engines[dtype] = Engine(self.folder, dtype=dtype, device=self.world.device, trust_remote_code=trust)
        return self._engines[dtype]

    def free_engine(self) -> None:
        """Lets the verifier go, so that training has its memory."""
        self._engines.clear()

    def tell(self, event: Event) -> None:
        """Passes any event on, from rank 0."""
        if self.world.is_main:
            self.listen(event)

    @contextmanager
    def alone(self, folder: Path, stage: str) -> Iterator[None]:
        """Keeps other runs off a folder that they share: runs of two seeds make the same states in one place."""
        if not self.world.is_main:
            yield
            return
        locks = self.places.cache / "locks"
        with disk_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
        with locked(locks / f"{stage}-{folder.name}", self.tell, stage=stage):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Tells that a stage starts and, with the words that its body puts into the list, that it is done."""
        began = time.monotonic()
        self.tell(StageEvent(stage=name, status="start"))
        words: list[str] = []
        yield words
        self.tell(StageEvent(stage=name, status="done", detail="; ".join(words), seconds=time.monotonic() - began))

    def skip(self, name: str, why: str) -> None:
        """Tells that a stage is not run, and why."""
        self.tell(StageEvent(stage=name, status="skip", detail=why))


@attrs.define(eq=False)
class EventLog:
    """Appends events to a file as JSON lines and passes them on; progress is only passed on.

    Until `file` is known events are kept, so that the first stages are in the log, too.
    """

    then: Listen
    file: Path | None = None
    _kept: list[str] = attrs.field(init=False, factory=list)

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        if not isinstance(event, ProgressEvent):
            self._kept.append(json.dumps({"time": round(time.time(), 3), **to_json(event)}))
            self.flush()
        self.then(event)

    def open(self, file: Path) -> None:
        """Names the file, whose folder exists."""
        self.file = file
        self.flush()

    def flush(self) -> None:
        """Writes what is kept."""
        if self.file is not None and self._kept:
            with disk_errors(self.file), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(line + "\n" for line in self._kept)
            self._kept.clear()
