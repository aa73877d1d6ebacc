"""Starts several processes on this machine with torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import elastic_launch

from speculators.compat import launch_config
from speculators.cpu import usable_cpus
from speculators.errors import RecipeError, TrainingError
from speculators.training.world import check_gpus

# After Ctrl-C the processes finish their update and write a checkpoint before they are killed.
SHUTDOWN_SECONDS = 600
INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(arguments: Sequence[str], *, nproc: int) -> int:
    """Runs `python arguments` as `nproc` processes that form one world, and returns their exit code.

    Only rank 0 prints. The others would repeat it, so their output appears only if rank 0 printed no error. After
    Ctrl-C or SIGTERM this waits for all to end; the code is then 130.

    Raises:
        TrainingError: a process was killed, or one other than rank 0 failed alone; or there are fewer GPUs.
    """
    check_gpus(nproc, option="--nproc ")
    # Deaths of children are reported below, once, so the launcher must not log them; each of its loggers has a level.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # The launcher replaces these handlers by its own.
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // nproc)))
    with tempfile.TemporaryDirectory(prefix="spec-launch-") as logs:
        silent = dict.fromkeys(range(1, nproc), Std.ALL)
        config = launch_config(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=silent),
            shutdown_seconds=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException:
            return INTERRUPTED
        except ChildFailedError as error:
            return _exit_code(error.failures, Path(logs))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def _exit_code(failures: dict[int, ProcessFailure], logs: Path) -> int:
    """Returns the code of the process that failed first, reporting why unless rank 0 did."""
    main = failures.get(0)
    if main is not None and main.exitcode > 0:
        return main.exitcode
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode < 0:
        raise TrainingError(f"process {rank} was killed by signal {-first.exitcode}", hint="run again to resume")
    stderr = "".join(file.read_text("utf-8", "replace") for file in logs.rglob(f"{rank}/stderr.log")).strip()
    if first.exitcode == RecipeError.exit_code and stderr:
        # All processes refuse the recipe for the same reason, and this one ended before rank 0 could print it.
        print(stderr, file=sys.stderr)
        return first.exitcode
    raise TrainingError(f"process {rank} failed with code {first.exitcode}:\n{stderr}", hint="run again to resume")
