"""Writes the pages beside exported weights: `serve.md`, and a model card for the hub."""

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
    "the acceptance rate of each position.",
    "sglang": "`curl -s localhost:30000/get_server_info` has `avg_spec_accept_length`; the log has `accept len`.",
}


@attrs.frozen(kw_only=True)
class ServingFacts:
    """What both pages state.

    Attributes:
        name: of the speculator, for people.
        algorithm: of the speculator.
        verifier: its folder or hub id.
        server: which reads the folder.
        command: which serves it.
        tokens: K.
        notes: what users of the export should know.
        background: the run that made the speculator.
    """

    name: str
    algorithm: str
    verifier: str
    server: str
    command: tuple[str, ...]
    tokens: int
    notes: tuple[str, ...]
    background: Background


def serve_page(facts: ServingFacts) -> str:
    """Writes `serve.md`: the command, the acceptance length to expect, and how to check it."""
    lines = [f"# Serving {facts.name}", "", f"A draft model ({facts.algorithm}) for `{facts.verifier}`.", ""]
    lines += _command(facts)
    lines += ["", "## What to expect", "", *_expected(facts), "", _HOW_TO_CHECK[facts.server], ""]
    return "\n".join(lines)


def _command(facts: ServingFacts) -> list[str]:
    notes = [f"* {note}" for note in facts.notes]
    return ["```bash", shlex.join(facts.command), "```", *([""] if notes else []), *notes]


def _expected(facts: ServingFacts) -> list[str]:
    measured = tuple(each for each in facts.background.settings if each.num_speculative_tokens == facts.tokens)
    if not measured:
        command = f"`spec bench RUN --k {facts.tokens}`"
        return [f"Not measured at K = {facts.tokens}; {command} measures it, and the next export lists it."]
    advice = "An acceptance length outside the interval, on the same prompts at the same K and T, points to a fault."
    return [*acceptance_table(measured), "", advice]


def model_card(facts: ServingFacts) -> str:
    """Writes README.md of a hub repository."""
    known = facts.background
    lines = [
        "---",
        f"base_model: {facts.verifier}",
        "tags:",
        "- speculative-decoding",
        f"- {facts.algorithm}",
        "---",
    ]
    lines += ["", f"# {facts.name}", ""]
    lines += [f"A draft model ({facts.algorithm}) for speculative decoding with `{facts.verifier}`."]
    lines += ["It does not change the verifier's output, only the number of steps that the verifier needs.", ""]
    lines += ["## Serve", "", *_command(facts)]
    lines += ["", "## Acceptance", ""]
    if known.settings:
        lines += acceptance_table(known.settings)
        lines += [
            "",
            "`live` is a lossless decode of a sample of the prompts, which had to agree with the exact number.",
        ]
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
    """Writes a Markdown table of acceptance lengths, followed by their definitions."""
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
