"""The devices that costs can be estimated for: memory and speed. Nothing heavy is imported: a typo shows at once."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from speculators.errors import Problem, RecipeError
from speculators.registry import near_miss

# Dense peaks of the vendors' data sheets (SXM where there are several): memory in GB, TFLOP/s in bf16 and in float32.
PEAKS: dict[str, tuple[int, float, float]] = {
    "A100": (80, 312, 19.5),
    "H100": (80, 989, 67),
    "H200": (141, 989, 67),
    "B200": (180, 2250, 75),
    "L4": (24, 121, 30.3),
    "L40S": (48, 362, 91.6),
    "MI300X": (192, 1307, 163.4),
    "RTX4090": (24, 165, 82.6),
}


@attrs.frozen(kw_only=True)
class Device:
    """A number of equal devices, with one process each.

    Attributes:
        name: as the user wrote it, with the number.
        kind: "cuda" or "cpu".
        memory_bytes: of one device; None if unknown.
        peaks: operations per second of one device by precision; empty if unknown.
    """

    name: str
    count: int
    kind: str = "cuda"
    memory_bytes: float | None = None
    peaks: Mapping[str, float] = attrs.field(factory=dict)


def parse_devices(text: str) -> list[Device]:
    """Reads a list such as "8xH100-80GB,1xL40S"; memory defaults to the usual size.

    Raises:
        RecipeError: names the part that cannot be read.
    """
    return [_device(part.strip()) for part in text.split(",")]


def _device(text: str) -> Device:
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9]+)(?:-(\d+)GB)?", text)
    count, name, memory = match.groups() if match else (None, "", None)
    if not match or 0 in (int(count or 1), int(memory or 1)):
        raise RecipeError([Problem("--gpus", f"must be like 8xH100-80GB, numbers from 1, got {text!r}")])
    if name.upper() not in PEAKS:
        hint = near_miss(name.upper(), list(PEAKS)) or f"available: {', '.join(PEAKS)}"
        raise RecipeError([Problem("--gpus", f"no figures for a device {name!r}", hint)])
    usual, bf16, fp32 = PEAKS[name.upper()]
    return Device(
        name=text,
        count=int(count or 1),
        memory_bytes=float(memory or usual) * 1e9,
        peaks={"bf16": bf16 * 1e12, "fp32": fp32 * 1e12},
    )
