"""`python -m speculators.cli`, which torchrun starts."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
