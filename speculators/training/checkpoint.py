"""Checkpoints on disk: written aside and renamed, verified before use; the latest few and the best are kept."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from speculators.errors import ArtifactError
from speculators.events import SaveEvent, WarningEvent
from speculators.files.folders import MANIFEST, read_manifest, replace_folder, seal, verify
from speculators.training import snapshot
from speculators.training.optimizer import Optimizer
from speculators.training.state import TrainState
from speculators.training.world import World

FORMAT = 1
NAME = re.compile(r"step-(\d{8})")
ASIDE = "writing-"
DAMAGED = "damaged-"


def complete(folder: Path) -> list[Path]:
    """Lists the checkpoints in `folder` that have a manifest, oldest first; they may still be damaged."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).exists())


def latest(folder: Path) -> Path | None:
    """Finds the newest checkpoint in `folder`, if any."""
    return next(reversed(complete(folder)), None)


def best(folder: Path) -> Path | None:
    """Finds the checkpoint with the largest exact acceptance length (the earliest of equals), if any has one."""
    taus = {path: read_manifest(path)["tau"] for path in complete(folder)}
    measured = [path for path, tau in taus.items() if tau is not None]
    return max(measured, key=lambda path: taus[path], default=None)


@attrs.frozen(kw_only=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        keep: how many of the latest are kept, besides the best.
        fingerprint: of the run; a checkpoint of another run is refused.
    """

    folder: Path
    world: World
    keep: int
    fingerprint: str

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainState, tau: float | None) -> SaveEvent:
        """Writes a checkpoint so that, whenever the process dies, the folder holds only whole checkpoints.

        Args:
            tau: exact acceptance length of these weights; None if it was not measured.

        Raises:
            ArtifactError: it cannot be written (a full disk); earlier checkpoints are untouched.
        """
        aside, path = self.folder / f"{ASIDE}{state.step:08d}", self.folder / f"step-{state.step:08d}"
        facts = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "world_size": self.world.size,
            "tau": tau,
            "state": attrs.asdict(state),
        }
        try:
            self._together(partial(self._on_main, self._make_room, aside))
            self._together(partial(snapshot.write, aside, model, optimizer, self.world))
            self._together(partial(self._on_main, self._publish, aside, path, facts))
        except ArtifactError:
            self._on_main(shutil.rmtree, aside, True)
            self.world.barrier()
            raise
        return SaveEvent(step=state.step, path=path, best=state.best_step == state.step)

    def resume(self, model: nn.Module, optimizer: Optimizer) -> Generator[WarningEvent, None, TrainState]:
        """Loads the newest intact checkpoint into model and optimizer.

        Yields:
            A warning for each damaged checkpoint, which is renamed and left aside.

        Returns:
            The state to resume from: the newest intact checkpoint's, or a new one if there is none.

        Raises:
            ArtifactError: the newest intact checkpoint belongs to another run, or was written by another version.
        """
        intact: dict[Path, dict[str, Any]] = {}
        for path in self.world.broadcast(complete(self.folder)):
            manifest, problem = self.world.broadcast(self._inspect(path))
            if problem is None:
                intact[path] = manifest
            else:
                aside = path.with_name(DAMAGED + path.name)
                self._together(partial(self._on_main, replace_folder, path, aside))
                yield WarningEvent(message=f"damaged checkpoint, moved to {aside} and not used: {problem}")
        if not intact:
            return TrainState()
        newest = max(intact)
        self._check_ours(newest, intact[newest])
        snapshot.read(newest, model, optimizer, self.world)
        yield from self._resume_rng(newest, intact[newest]["world_size"])
        return _state_of(newest, intact)

    def _inspect(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """Reads manifest and problem on rank 0 alone: hashing every file on every process would give the same."""
        if not self.world.is_main:
            return {}, None
        try:
            return verify(path, hint=""), None
        except ArtifactError as error:
            return {}, str(error)

    def _check_ours(self, path: Path, manifest: dict[str, Any]) -> None:
        if manifest["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}",
                hint="finish the run with the version that began it, or remove the folder to start over",
            )
        if manifest["fingerprint"] != self.fingerprint:
            raise ArtifactError(
                f"{path} belongs to another run: its train fingerprint is {manifest['fingerprint'][:8]}, "
                f"this run's is {self.fingerprint[:8]}",
                hint="give this run another folder, or remove the old checkpoints",
            )

    def _resume_rng(self, path: Path, saved_by: int) -> Iterator[WarningEvent]:
        if saved_by == self.world.size:
            snapshot.read_rng(path, self.world)
        else:
            yield WarningEvent(
                message=f"{path.name} was saved by {saved_by} processes and is resumed by {self.world.size}: "
                "weights and rows continue unchanged, but an algorithm's random numbers from numpy or Python differ"
            )

    def _on_main(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.world.is_main:
            action(*arguments)

    def _together(self, action: Callable[[], None]) -> None:
        """Runs `action` on every process; if it fails on one, all raise the same ArtifactError."""
        cause: BaseException | None = None
        try:
            action()
        except (OSError, RuntimeError, ArtifactError, CheckpointException) as error:
            cause = _root(error)
        reasons = [text for text in self.world.gather(None if cause is None else _explain(cause, self.folder)) if text]
        if reasons:
            raise self._cannot_write(reasons[0]) from cause

    def _cannot_write(self, reason: str) -> ArtifactError:
        earlier = latest(self.folder)
        hint = f"run again to resume from {earlier}" if earlier else "there is no earlier checkpoint to resume from"
        return ArtifactError(f"cannot write a checkpoint in {self.folder}: {reason}", hint=hint)

    def _make_room(self, aside: Path) -> None:
        """Makes an empty folder to write into, and removes what killed processes left behind."""
        for left in self.folder.glob(f"{ASIDE}*"):
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def _publish(self, aside: Path, path: Path, facts: dict[str, Any]) -> None:
        seal(aside, facts)
        replace_folder(aside, path)
        self._forget_old()

    def _forget_old(self) -> None:
        stay = {*complete(self.folder)[-self.keep :], best(self.folder)}
        for path in self.folder.glob("step-*"):
            if path not in stay:
                # The manifest goes first: if the process dies in the middle, what is left is not a checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)


def _state_of(newest: Path, intact: dict[Path, dict[str, Any]]) -> TrainState:
    """Returns the state to resume from; if the best checkpoint is damaged, the best of the others takes its place."""
    state = TrainState(**intact[newest]["state"])
    if state.best_step in [manifest["state"]["step"] for manifest in intact.values()]:
        return state
    left = best(newest.parent)
    if left is None:
        return attrs.evolve(state, best_tau=None, best_step=None)
    return attrs.evolve(state, best_tau=intact[left]["tau"], best_step=intact[left]["state"]["step"])


def _root(error: BaseException) -> BaseException:
    """Unwraps what dcp wrapped; an interrupt inside it is still an interrupt."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
    return causes[0]


def _explain(error: BaseException, folder: Path) -> str:
    """Finds the disk's own error, which torch's writer buries under one about its file format."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    if link is None:
        return f"{type(error).__name__}: {error}"
    if link.errno != errno.ENOSPC:
        return str(link)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"the disk is full, {shutil.disk_usage(existing).free / 1e6:.1f} MB are free ({link})"
