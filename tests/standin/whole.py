"""The stand-in for whole programs: what threads, streams, loading and CUDA's own counts need besides tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint.filesystem as checkpoint_files
from standin.device import device
from torch.utils._python_dispatch import _disable_current_modes

from speculators.data import prefetch
from speculators.verifier import engine
from speculators.verifier.tiny import make_tiny_verifier


class AtOnce:
    """Does work when it is handed in: the stand-in's device belongs to one thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


class OneByOne(checkpoint_files._SerialCpuLoader):
    """Copies tensors for a checkpoint without streams."""

    def __init__(self, resolve: Any, **_: Any) -> None:
        super().__init__(resolve)


class Stream:
    """A stream whose work is done when it is handed in; it is its own event."""

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        pass


def on_host(load: Any) -> Any:
    """Loads a model as on a machine without a device, as Engine does before it moves the model there."""

    def loaded(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return load(*arguments, **named)

    return loaded


@contextmanager
def whole_device() -> Iterator[None]:
    """Makes torch find one GPU for a program, from its choice of a device to its checkpoints."""
    # transformers imports a model's code when one is loaded, and that must not see the stand-in.
    with tempfile.TemporaryDirectory() as folder:
        engine.Engine(make_tiny_verifier(Path(folder)))
    memory = {"total_memory": 1_000_000_000, "multi_processor_count": 1}
    with (
        patch.object(prefetch, "ThreadPoolExecutor", AtOnce),
        patch.object(checkpoint_files, "_OverlappingCpuLoader", OneByOne),
        patch.object(engine, "_load", on_host(engine._load)),
        patch("torch.cuda.get_rng_state", torch.get_rng_state),
        patch("torch.cuda.set_rng_state", torch.set_rng_state),
        patch("torch.cuda.current_stream", lambda _: Stream()),
        patch("torch.cuda.set_device", lambda _: None),
        patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(**memory)),
        patch("torch.cuda.empty_cache", lambda: None),
        patch("torch.cuda.reset_peak_memory_stats", lambda _: None),
        patch("torch.cuda.max_memory_allocated", lambda _: 0),
        patch("torch.cuda.set_sync_debug_mode", lambda _: None),
        device(),
    ):
        yield
