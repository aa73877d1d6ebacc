"""`python -m speculators.cli`, which torchrun starts."""

from __future__ import annotations

import os

from . import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        from speculators.training.world import leave

        leave(code)
    raise SystemExit(code)
