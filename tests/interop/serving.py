"""Servers that a test starts as a user would, and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from foreign import vllm

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint, Retry

START_SECONDS = 300


def free_port() -> int:
    """Finds a port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a serving program in vLLM's environment; the block runs from its first /health answer, and then it is
    stopped."""
    log = work / f"server-{port}.log"
    variables = {**vllm().variables(), "SPECULATORS_CACHE": os.environ.get("SPECULATORS_CACHE", "")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=work
        )
    try:
        _wait_for(process, Endpoint(url=f"http://127.0.0.1:{port}", retry=Retry(times=0)), log)
        yield process
    finally:
        # vLLM starts processes of its own: it is asked once to stop, then the whole session is ended.
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def vllm_serve(model: Path, work: Path, *arguments: str) -> Iterator[str]:
    """Runs `vllm serve MODEL` in float32 during the block; yields its address."""
    port = free_port()
    command = [str(vllm().folder / "bin" / "vllm"), "serve", str(model), "--dtype", "float32", "--enforce-eager"]
    with running([*command, "--host", "127.0.0.1", "--port", str(port), *arguments], port, work):
        yield f"http://127.0.0.1:{port}"


def _wait_for(process: subprocess.Popen[bytes], endpoint: Endpoint, log: Path) -> None:
    for _ in range(START_SECONDS):
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
        try:
            endpoint.get_text("/health")
        except ServerError:
            time.sleep(1)
        else:
            return
    raise AssertionError(f"no server in {START_SECONDS} s:\n{log.read_text()[-6000:]}")
