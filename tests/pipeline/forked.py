"""Processes that start at once: the server has imported what they need before it forks them."""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch._dynamo", "speculators.pipeline", "speculators.report.bench"])
