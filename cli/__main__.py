"""`python -m speculators.cli`, the program that torchrun starts."""

from __future__ import annotations

import os

from . import main

if __name__ == "__main__":
    code = main()
    # A process of a launch skips the interpreter's teardown, which sometimes aborts a finished run.
    if "RANK" in os.environ:
        from speculators.training.world import leave

        leave(code)
    raise SystemExit(code)
