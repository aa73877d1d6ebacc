"""Writes the pages beside exported weights: `serve.md`, and a model card for the hub."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from speculators.bench.conclusion import reliable_speed_up
from speculators.bench.result import Setting
from speculators.formats.server_layout import SGLANG, VLLM
from speculators.recipe.lock import Lock
from speculators.runs.background import Background
from speculators.tune.result import BatchRange

_PORTS = {VLLM: 8000, SGLANG: 30000}
_PLAIN = {
    VLLM: ("vllm", "serve", "{verifier}", "--port", "{port}"),
    SGLANG: ("python", "-m", "sglang.launch_server", "--model-path", "{verifier}", "--port", "{port}"),
}
# What a server needs to be asked for its counters, which `spec bench` reads.
_COUNTING = {VLLM: "", SGLANG: "Start both servers with `--enable-metrics`, which `spec bench` reads."}
_HOW_TO_CHECK = {
    VLLM: "`curl -s localhost:8000/metrics | grep vllm:spec_decode`: acceptance length is 1 + "
    "`num_accepted_tokens_total` / `num_drafts_total`, and `num_accepted_tokens_per_pos_total` / `num_drafts_total` "
    "the acceptance rate of each position.",
    SGLANG: "`curl -s localhost:30000/get_server_info` has `avg_spec_accept_length`; the log has `accept len`.",
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
        commands: which serve it with each K that was measured, and with `tokens`.
        chat: the part of these commands that says how conversations are rendered.
        asked_with: arguments of the chat template that each request carries.
        tokens: K.
        why: where K comes from.
        schedule: K of each range of batch sizes; () for `tokens` at every batch size.
        notes: what users of the export should know.
        background: the run that made the speculator.
    """

    name: str
    algorithm: str
    verifier: str
    server: str
    command: tuple[str, ...]
    commands: Mapping[int, tuple[str, ...]]
    chat: tuple[str, ...]
    asked_with: Mapping[str, Any]
    tokens: int
    why: str
    schedule: tuple[BatchRange, ...]
    notes: tuple[str, ...]
    background: Background

    @property
    def run(self) -> str:
        """The run as commands name it."""
        return self.background.run or "RUN"


def serve_page(facts: ServingFacts) -> str:
    """Writes `serve.md`: the commands, the acceptance length to expect, and how to check both."""
    lines = [f"# Serving {facts.name}", "", f"A draft model ({facts.algorithm}) for `{facts.verifier}`.", ""]
    lines += _command(facts)
    lines += ["", "## What to expect", "", *_expected(facts), "", _HOW_TO_CHECK[facts.server], ""]
    lines += [*_other_k(facts), *_request(facts), *_comparison(facts)]
    return "\n".join(lines)


def _command(facts: ServingFacts) -> list[str]:
    notes = [f"* {note}" for note in facts.notes]
    most = "at most " if facts.schedule else ""
    drafts = f"It drafts {most}{facts.tokens} tokens per round (K), {facts.why}."
    if facts.schedule:
        by_batch = ", ".join(f"{first} to {last}: {k}" for first, last, k in facts.schedule)
        drafts += f" By sequences under way at once, {by_batch}; 0 drafts nothing, and more sequences keep the last K."
    return ["```bash", shlex.join(facts.command), "```", "", drafts, *([""] if notes else []), *notes]


def _expected(facts: ServingFacts) -> list[str]:
    settings = facts.background.settings
    if not settings:
        command = f"`spec bench {facts.run} --k {facts.tokens}`"
        return [f"Not measured; {command} measures it, and the next export lists it."]
    lines = acceptance_table(settings)
    if all(each.num_speculative_tokens != facts.tokens for each in settings):
        lines += ["", f"Not measured at K = {facts.tokens}: `spec bench {facts.run} --k {facts.tokens}` measures it."]
    return [
        *lines,
        "",
        "An acceptance length outside the interval, on the same prompts at the same K and T, points to a fault. "
        "Speed-ups are those of the machine that measured, not of your server.",
    ]


def _other_k(facts: ServingFacts) -> list[str]:
    """Lists a command for each measured K, with K stated on the command line."""
    if len({*facts.commands.values()}) < len(facts.commands):
        return ["## Another K", "", f"K is in config.json: `spec export {facts.run} --k K` writes it with another.", ""]
    lines = ["## Another K", "", "These commands state K themselves:", "", "```bash"]
    return [*lines, *(shlex.join(command) for command in facts.commands.values()), "```", ""]


def _request(facts: ServingFacts) -> list[str]:
    """Shows one request; the server itself says how it calls its model."""
    url = f"http://localhost:{_PORTS[facts.server]}/v1"
    name = "import json, sys; print(json.load(sys.stdin)['data'][0]['id'])"
    asked = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 64}
    asked |= {"chat_template_kwargs": dict(facts.asked_with)} if facts.asked_with else {}
    # Within quotes of the shell, except for the variable.
    rest = json.dumps(asked, ensure_ascii=False)[1:].replace("'", "'\\''")
    body = '{"model": "\'$MODEL\'", ' + rest
    return [
        "## Try it",
        "",
        "```bash",
        f'MODEL=$(curl -s {url}/models | python3 -c "{name}")',
        f"curl -s {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        "```",
        "",
    ]


def _comparison(facts: ServingFacts) -> list[str]:
    """Shows how to measure the speed-up over the verifier alone."""
    port = _PORTS[facts.server]
    plain = [part.format(verifier=facts.verifier, port=port + 1) for part in _PLAIN[facts.server]]
    bench = f"spec bench {facts.run} --engine {facts.server} --endpoint http://localhost:{port}"
    lines = [
        "## Compare it with the server without drafts",
        "",
        "Start a second server, of the same version and on an equal device, with the verifier alone:",
        "",
        "```bash",
        shlex.join([*plain, *facts.chat]),
        f"{bench} --baseline-endpoint http://localhost:{port + 1}",
        "```",
        "",
        "`spec bench` sends the same prompts to both, one server after the other, and prints the acceptance length and "
        "the speed-up. `--concurrency N` shows what is left of it under load.",
    ]
    return [*lines, *([_COUNTING[facts.server]] if _COUNTING[facts.server] else []), ""]


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
    columns = ("suite", "prompts", "K", "T", "tau (95%)", "live", "speed-up", "accepted by position")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for each in sorted(settings, key=lambda each: (each.suite, each.temperature, each.num_speculative_tokens)):
        low, high = each.exact.tau_interval
        live = f"{each.live.acceptance.tau:.3f}" if each.live else ""
        speed = reliable_speed_up(each)
        speed_up = f"{speed:.2f}x" if speed is not None else "not reliable" if each.live else ""
        rates = " ".join(f"{rate:.2f}" for rate in each.exact.by_position if not math.isnan(rate))
        rows.append(
            f"| {each.suite} | {each.exact.prompts} | {each.num_speculative_tokens} | {each.temperature:g} "
            f"| {each.exact.tau:.3f} ({low:.2f} to {high:.2f}) | {live} | {speed_up} | {rates} |"
        )
    definitions = dict.fromkeys(each.definition for each in settings)
    return [*rows, "", *(f"* {definition}" for definition in definitions)]
