"""Encodes conversations in their order; uses several processes for large numbers of them, if the machine has cores."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

from speculators.cpu import usable_cpus
from speculators.data.encoded import Encoded
from speculators.data.messages import Conversation
from speculators.data.template import ChatTemplate
from speculators.errors import DataError

# Conversations to encode before other processes are started, whose imports take seconds.
ALONE = 4096
# A single process reads and writes, which takes a fifth of the time that encoding short conversations takes.
MOST_PROCESSES = 8
# Conversations to send to a process at once.
BATCH = 32

Rows = list[Encoded] | str
_Process = tuple[Connection, subprocess.Popen[bytes]]


def encode_all(
    conversations: Iterable[Conversation], template: ChatTemplate, max_tokens: int
) -> Generator[tuple[Conversation, Rows], None, None]:
    """Yields each conversation with the result of `ChatTemplate.encode`, whatever the number of processes.

    Raises:
        DataError: one of the processes was killed.
    """
    stream = iter(conversations)
    processes = min(usable_cpus(), MOST_PROCESSES)
    # Some tokenizers cannot be pickled: then this process encodes alone.
    pickled = _pickled((template, max_tokens)) if processes > 1 else None
    for conversation in itertools.islice(stream, None if pickled is None else ALONE):
        yield conversation, template.encode(conversation, max_tokens)
    following = next(stream, None)
    if following is not None and pickled is not None:
        with _Encoders(pickled, processes) as encoders:
            for batch, answers in encoders.encode(itertools.chain([following], stream)):
                # None: encoding failed there, and fails here with its own error.
                yield from zip(batch, answers or [template.encode(one, max_tokens) for one in batch], strict=True)


def _pickled(value: tuple[ChatTemplate, int]) -> bytes | None:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


class _Encoders:
    """Processes that each encode one batch at a time, with a thread for each that waits for its answers.

    `multiprocessing` would run the caller's script again in each process. A script without the guard
    `if __name__ == "__main__"` would then start its run again and wait for the lock that its first run holds.
    """

    def __init__(self, pickled: bytes, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes, "encode")
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._waiting = 2 * processes
        self._processes = [_start() for _ in range(processes)]
        for process in self._processes:
            self._threads.submit(self._begin, process, pickled)

    def _begin(self, process: _Process, pickled: bytes) -> None:
        # A process that has ended is reported by `_ask`.
        with contextlib.suppress(OSError):
            process[0].send_bytes(pickled)
        self._idle.put(process)

    def encode(self, conversations: Iterator[Conversation]) -> Iterator[tuple[list[Conversation], list[Rows] | None]]:
        """Yields batches in their order, and reads a bounded number of them ahead."""
        begun: deque[tuple[list[Conversation], Future[list[Rows] | None]]] = deque()
        while batch := list(itertools.islice(conversations, BATCH)):
            begun.append((batch, self._threads.submit(self._ask, batch)))
            if len(begun) > self._waiting:
                batch, answers = begun.popleft()
                yield batch, answers.result()
        yield from ((batch, answers.result()) for batch, answers in begun)

    def _ask(self, batch: list[Conversation]) -> list[Rows] | None:
        connection, process = self._idle.get()
        try:
            connection.send(batch)
            answers: list[Rows] | None = connection.recv()
        except (EOFError, OSError):
            raise DataError(
                f"a process that encodes conversations ended with code {process.wait()}",
                hint="a negative code is a signal: -9 often means that memory ran out; run again",
            ) from None
        finally:
            self._idle.put((connection, process))
        return answers

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        # A process ends when its connection does. Threads that still wait for one would keep it open.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for connection, process in self._processes:
            connection.close()
            process.wait()


def _start() -> _Process:
    ours, theirs = Pipe()
    # This process's path finds plug-ins, and the code that comes with a tokenizer.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve({theirs.fileno()})"
    # One text at a time gains nothing from threads.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours, process


def _serve(handle: int) -> None:
    """Answers the batches of another process until that ends."""
    # The other process decides whether an interrupt ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Any = Connection(handle)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        template: Any = None
        with contextlib.suppress(Exception):
            template, max_tokens = connection.recv()
        while True:
            batch = connection.recv()
            try:
                answers = [template.encode(conversation, max_tokens) for conversation in batch]
            # The other process meets the same error when it encodes the batch itself.
            except Exception:
                answers = None
            connection.send(answers)
