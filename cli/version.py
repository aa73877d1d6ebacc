"""What `spec --version` prints: the facts that a bug report needs."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata, resources
from pathlib import Path

PACKAGES = ("torch", "transformers", "vllm", "sglang")


def print_version() -> int:
    """Prints version and commit, packages, and the device that a run would use."""
    print(", ".join(part for part in (f"spec-recipes {metadata.version('spec-recipes')}", _commit()) if part))
    print(f"Python {platform.python_version()}, {platform.platform(terse=True)}")
    versions = {name: _version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    # Only the last line needs torch, which takes seconds to import.
    print(f"device: {_device()}", flush=True)
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of a checkout; "" for an installed package, even one inside somebody else's repository."""
    root = Path(str(resources.files("speculators"))).resolve().parent
    if not (root / ".git").exists():
        return ""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"commit {commit.strip()[:12]}{' with uncommitted changes' if changes else ''}"


def _device() -> str:
    try:
        from speculators.training.world import World, local_device

        return World(device=local_device()).device_name
    except (ImportError, OSError, RuntimeError) as error:  # a broken installation must still print its version
        return f"unknown ({type(error).__name__}: {error})"
