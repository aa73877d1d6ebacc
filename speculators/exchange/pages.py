"""The pages beside exported weights: `serve.md`, and a model card for the hub."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

import attrs

from speculators.bench.result import Setting
from speculators.recipe.lock import Lock
from speculators.runs.background import Background

_HOW_TO_CHECK = {
    "vllm": "`curl -s localhost:8000/metrics | grep vllm:spec_decode`: acceptance length is 1 + "
    "`num_accepted_tokens_total` / `num_drafts_total`, and `num_accepted_tokens_per_pos_total` / `num_drafts_total` "
    "the rate of each position.",
    "sglang": "`curl -s localhost:30000/get_server_info` tells `avg_spec_accept_length`; the log tells `accept len`.",
}


@attrs.frozen(kw_only=True)
class Subject:
    """What the pages are about.

    Attributes:
        name: of the speculator, for people.
        algorithm: of it.
        verifier: its folder or hub id.
        server: that reads the folder.
        command: that serves it.
        tokens: drafted a round (K).
        notes: what whoever serves it should know.
    """

    name: str
    algorithm: str
    verifier: str
    server: str
    command: tuple[str, ...]
    tokens: int
    notes: tuple[str, ...]
    background: Background


def serve_page(subject: Subject) -> str:
    """Returns `serve.md`."""
    lines = [f"# Serving {subject.name}", "", f"A draft model ({subject.algorithm}) for `{subject.verifier}`.", ""]
    lines += _command(subject)
    lines += ["", "## What it should reach", "", *_expected(subject), "", _HOW_TO_CHECK[subject.server], ""]
    return "\n".join(lines)


def _command(subject: Subject) -> list[str]:
    notes = [f"* {note}" for note in subject.notes]
    return ["```bash", shlex.join(subject.command), "```", *([""] if notes else []), *notes]


def _expected(subject: Subject) -> list[str]:
    here = tuple(each for each in subject.background.settings if each.num_speculative_tokens == subject.tokens)
    if not here:
        measure = f"`spec bench RUN --k {subject.tokens}`"
        return [f"Not measured at K = {subject.tokens}; {measure} of its run does, and another export tells it."]
    words = (
        "An acceptance length outside of the interval, on the same prompts at the same K and T, is a fault to look for."
    )
    return [*acceptance_table(here), "", words]


def card(subject: Subject) -> str:
    """Returns README.md of a hub repository."""
    known = subject.background
    lines = [
        "---",
        f"base_model: {subject.verifier}",
        "tags:",
        "- speculative-decoding",
        f"- {subject.algorithm}",
        "---",
    ]
    lines += ["", f"# {subject.name}", ""]
    lines += [f"A draft model ({subject.algorithm}) for speculative decoding with `{subject.verifier}`."]
    lines += ["The output of the verifier does not change; only how many of its steps are needed.", ""]
    lines += ["## Serve", "", *_command(subject)]
    lines += ["", "## Acceptance", ""]
    if known.settings:
        lines += acceptance_table(known.settings)
        lines += ["", "`live` is a lossless decode of a sample of the prompts that had to agree with the exact number."]
    else:
        lines += ["Not measured."]
    lines += [*_recipe(known), *_lock(known.lock), ""]
    return "\n".join(lines)


def _recipe(known: Background) -> list[str]:
    if known.recipe is None:
        return []
    return ["", "## Recipe", "", f"Run `{known.run}`:", "", "```toml", known.recipe.rstrip(), "```"]


def _lock(lock: Lock | None) -> list[str]:
    if lock is None:
        return []
    where, code = lock.environment, lock.environment.code
    packages = ", ".join(f"{name} {version}" for name, version in where.packages.items())
    rows = [
        ("stages", ", ".join(f"{stage} `{key[:12]}`" for stage, key in lock.fingerprints.items())),
        ("verifier", ", ".join(f"{name} `{key[:12]}`" for name, key in lock.verifier.files.items())),
        ("seed", str(lock.seed)),
        ("code", f"{code.version}, sources `{code.sources[:12]}`"),
        ("packages", packages),
        ("device", f"{where.device_name}, {where.world_size} process(es), {where.threads} threads"),
    ]
    return ["", "## Lock", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def acceptance_table(settings: Sequence[Setting]) -> list[str]:
    """Returns a Markdown table of acceptance lengths, and below it the definition of each."""
    rows = ["| suite | prompts | K | T | tau (95%) | live | accepted by position |", "|---|---|---|---|---|---|---|"]
    for each in settings:
        low, high = each.exact.tau_interval
        live = f"{each.live.acceptance.tau:.3f}" if each.live else ""
        rates = " ".join(f"{rate:.2f}" for rate in each.exact.by_position if not math.isnan(rate))
        rows.append(
            f"| {each.suite} | {each.exact.prompts} | {each.num_speculative_tokens} | {each.temperature:g} "
            f"| {each.exact.tau:.3f} ({low:.2f} to {high:.2f}) | {live} | {rates} |"
        )
    definitions = dict.fromkeys(each.definition for each in settings)
    return [*rows, "", *(f"* {definition}" for definition in definitions)]
