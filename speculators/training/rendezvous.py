"""Lets the processes of a launch find each other, even after torchrun has restarted it."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from speculators.errors import TrainingError

_PORT = "speculators/port"
# The limit of one attempt to connect to rank 0, and the pause before the next.
_ANSWER_SECONDS, _PAUSE_SECONDS = 5.0, 0.2


def fresh_store(rank: int, patience: timedelta) -> dist.Store | None:
    """Opens a store on rank 0 that serves only this start of the launch; every process calls this.

    torchrun's agents keep one store for all restarts, with the addresses of processes that have died since. Up to torch
    2.13 at least, new processes may read those addresses instead of each other's, and fail or wait in vain (pytorch
    #135712). The number of restarts does not tell the starts apart, because each machine counts its own failures. So
    the agents' store only says where rank 0 is, and is read again until rank 0 answers there. An old rank 0 cannot
    answer: torchrun starts no process before the old ones are dead.

    Returns:
        None where no agent keeps a store, since rank 0 then makes one anyway.

    Raises:
        TrainingError: rank 0 did not answer within `patience`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host = os.environ["MASTER_ADDR"]
    agents = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=patience, wait_for_workers=False)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=patience, wait_for_workers=False)
        agents.set(_PORT, str(store.port))
        return store
    deadline = time.monotonic() + patience.total_seconds()
    while not _answers(host, port := int(agents.get(_PORT))):
        if time.monotonic() > deadline:
            raise TrainingError(f"process 0 does not answer at {host}:{port}", hint="start the launch again to resume")
        time.sleep(_PAUSE_SECONDS)
    return dist.TCPStore(host, port, timeout=patience, wait_for_workers=False)


def _answers(host: str, port: int) -> bool:
    # TCPStore itself would take its whole timeout to report a port at which nobody listens.
    with suppress(OSError), socket.create_connection((host, port), timeout=_ANSWER_SECONDS):
        return True
    return False
