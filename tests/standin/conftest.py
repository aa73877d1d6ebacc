"""The compiled stand-in, for both files of tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def hooks(pytestconfig: pytest.Config) -> Path:
    """The compiled hooks.cpp, kept for later sessions with the same torch."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stand-in is loaded with LD_PRELOAD, which is Linux's")
    if torch.version.cuda:
        pytest.skip("this torch has CUDA of its own, beside which the stand-in cannot register")
    source = Path(__file__).parent / "hooks.cpp"
    key = hashlib.sha256(f"{torch.__version__} {source.read_text()}".encode()).hexdigest()[:16]
    library = pytestconfig.cache.mkdir("standin") / f"hooks-{key}.so"
    if not library.exists():
        compiler = shutil.which("g++") or pytest.skip("no g++ here, which compiles the stand-in")
        from torch.utils.cpp_extension import include_paths

        torch_libraries = Path(torch.__file__).parent / "lib"
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(partial)]
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", "-Wl,--no-as-needed"]
        done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        partial.rename(library)
    return library
