"""Runs a module as a program on the stand-in, and every program that the GPU check starts from it likewise.

python program.py -m MODULE [ARGUMENT..]      with hooks.so in LD_PRELOAD and tests/ in PYTHONPATH
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# torchrun's workers have an interpreter and a process group of their own.
AS_THEY_ARE = ("torch.distributed.run",)


def main() -> None:
    _, option, module, *arguments = sys.argv
    assert option == "-m", f"python program.py -m MODULE, got {option}"
    sys.path[0] = str(ROOT)
    sys.argv = [module, *arguments]
    from benchmarks.gpu import command

    command.PYTHON[:] = [sys.executable, __file__]
    if module in ("benchmarks.gpu.check", *AS_THEY_ARE):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    import torch
    from standin.whole import whole_device

    torch.set_num_threads(1)
    with whole_device():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
