"""The program that torchrun starts in test_restarted.py: `spec`, in which each process is killed once, in its turn."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from speculators.cli import main
from speculators.events import Event, StepEvent
from speculators.pipeline.context import Context
from speculators.training.world import leave

# A process dies after this update, between two checkpoints; the second one in the launch that resumed from the first.
DEADLY = {"1": 6, "0": 7}


def deadly(home: Path) -> None:
    """Kills this process when its update comes, unless the folder says that it was killed before."""
    emit, rank = Context.emit, os.environ["RANK"]
    mark = home / f"killed-{rank}"

    def kill_or_emit(self: Context, event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == DEADLY[rank] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        emit(self, event)

    Context.emit = kill_or_emit  # type: ignore[method-assign]


if __name__ == "__main__":
    home = Path(sys.argv[1])
    if home.is_dir():
        deadly(home)
    leave(main(sys.argv[2:]))
