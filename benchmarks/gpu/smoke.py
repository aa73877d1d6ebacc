"""The part `smoke`: `spec run smoke` with each algorithm, drafting from a reduced and from the whole vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs

from benchmarks.gpu.command import overriding, spec
from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.facts import VerifierFacts
from speculators.verifier.tiny import make_tiny_verifier

REDUCED = 128
# Runs at once: each is tiny, and takes most of its time to start.
PROCESSES = max(1, min(4, (os.cpu_count() or 1) // 2))


@attrs.frozen
class SmokeCase:
    """An algorithm and the size of its draft vocabulary; None for the whole one."""

    algorithm: str
    drafts: int | None

    def __str__(self) -> str:
        return f"{self.algorithm}, {'whole' if self.drafts is None else 'reduced'} vocabulary"

    @property
    def override(self) -> str:
        """The table, which is merged with smoke's own: the vocabulary is therefore always set."""
        drafts = '"none"' if self.drafts is None else self.drafts
        return f'algorithm={{name="{self.algorithm}", draft_vocab_size={drafts}}}'


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each case, as the runs end."""
    facts = VerifierFacts.read(make_tiny_verifier(setup.folder / "tiny") / "config.json")
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield from pool.map(partial(ran, setup), cases(facts))


def cases(facts: VerifierFacts) -> list[SmokeCase]:
    """Lists the cases that the algorithms' own checks admit; some draft from the whole vocabulary only."""
    configs = {name: SpeculatorModelConfig.get_class(name) for name in CONFIGS.names()}
    reducible = [name for name, each in configs.items() if not [*each(draft_vocab_size=REDUCED).misfits(facts)]]
    both = dict.fromkeys(reducible, (REDUCED, None))
    return [SmokeCase(name, drafts) for name in configs for drafts in both.get(name, (None,))]


def ran(setup: PartSetup, case: SmokeCase) -> VerdictLine:
    """Makes one run in a process of its own."""
    return judged(str(case), partial(smoke, setup, case))


def smoke(setup: PartSetup, case: SmokeCase) -> Judged:
    """Runs all stages; live decoding must agree with replay, on the device of this check."""
    short = ("schedule.max_steps=2", "benchmark.live_prompts=1", "benchmark.max_new_tokens=8") if setup.small else ()
    options = ["smoke", "--json", "--quiet", "--runs", setup.folder / "smoke", *overriding(case.override, *short)]
    ended = spec("run", *options, seconds=setup.left, folder=setup.folder)
    if ended.code != 0:
        return {}, f"spec run ended with {ended.code}: {ended.tail}"
    result = json.loads(ended.out)
    settings = result["bench"]["settings"]
    figures = {
        "tau": settings[-1]["exact"]["tau"],
        "agrees": result["bench"]["agrees"],
        "seconds": result["seconds"],
        "device": result["bench"]["device"],
    }
    elsewhere = not figures["device"].startswith(setup.device.type)
    return figures, f"it ran on {figures['device']}, not on {setup.device}" if elsewhere else ""
