"""The part `capture`: how fast the states of an 8B verifier are captured, by the shape of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.verifier import random_verifier
from benchmarks.perf.capture import make_rows
from speculators.chunks import CHUNKS
from speculators.config import default_layer_ids
from speculators.verifier.engine import Engine

# Rows x tokens.
SHAPES = ((1, 2048), (2, 1200), (4, 2048), (8, 1100), (16, 2048))
SMALL_SHAPES = ((1, 16), (3, 10))
# Tokens of the rows of different lengths, short chats, as in benchmarks/perf/capture.py.
MIXED_TOKENS, SMALL_MIXED_TOKENS = 32_768, 400


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each shape, and one for packed and for padded rows of different lengths."""
    engine = Engine(random_verifier(setup), dtype="bfloat16", device=setup.device)
    generator = torch.Generator().manual_seed(0)
    for rows, length in SMALL_SHAPES if setup.small else SHAPES:
        ids = torch.randint(engine.facts.vocab_size, (rows, length), generator=generator)
        yield judged(f"{rows} x {length}", partial(captured, setup, engine, list(ids), "whole"))
        setup.release()
    mixed = make_rows(SMALL_MIXED_TOKENS if setup.small else MIXED_TOKENS, engine.facts.vocab_size)
    for how in ("padded", "packed"):
        yield judged(f"64 to 384 tokens, {how}", partial(captured, setup, engine, mixed, how))


def captured(setup: PartSetup, engine: Engine, rows: list[torch.Tensor], how: str) -> Judged:
    """Captures three layers and the last; tokens are counted without padding."""
    layer_ids = default_layer_ids(engine.num_layers)
    tokens = CHUNKS[setup.device.type].capture_tokens
    ways: dict[str, Callable[[], Any]] = {
        "whole": lambda: engine.capture(rows, layer_ids),
        "padded": lambda: list(engine.capture_all(rows, layer_ids, batch_tokens=tokens)),
        "packed": lambda: list(engine.capture_packed(rows, layer_ids)),
    }
    states = ways[how]()[-1][-1]
    milliseconds = setup.milliseconds(ways[how], 3)
    figures = {"tokens_per_s": sum(map(len, rows)) / milliseconds * 1e3, "ms": milliseconds, "peak_gb": setup.peak_gb}
    return figures, "" if bool(states.isfinite().all()) else "states are not finite"
