"""Where the supported versions of torch (2.11 and newer) differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.distributed.launcher.api import LaunchConfig


def launch_config(*, shutdown_seconds: int, **options: Any) -> LaunchConfig:
    """Configures torchrun's launcher to wait for its processes after Ctrl-C.

    torch 2.11 has no such option: it kills processes 30 seconds after Ctrl-C. If they need longer for their update and
    checkpoint, the run repeats the updates since the checkpoint before.

    Args:
        shutdown_seconds: time that processes get to end by themselves, where torch lets a caller choose it.
        options: other fields of LaunchConfig.
    """
    if any(field.name == "shutdown_timeout" for field in dataclasses.fields(LaunchConfig)):
        options["shutdown_timeout"] = shutdown_seconds
    return LaunchConfig(**options)
