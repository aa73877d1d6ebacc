"""Writes the first recipe for a verifier: a file with every choice that its author should know, and the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig
from speculators.facts import VerifierFacts
from speculators.recipe.checks import too_many_drafts
from speculators.recipe.input_sections import DTYPES, VerifierSection
from speculators.structure.spelling import toml_text

# Rows of `max_tokens` that each process takes through one update.
ROWS = 4
MAX_TOKENS = 2048
NUM_TOKENS = (3, 5, 7)
CHATS = "HuggingFaceH4/ultrachat_200k"
_WIDTH = 45


@attrs.frozen(kw_only=True)
class Starter:
    """The choices of a first recipe.

    Attributes:
        verifier: its section, with paths as the recipe will name them.
        facts: the verifier's config.json.
        config: of the algorithm, with `keys` set.
        keys: keys of `[algorithm]` beside the name, each with the comment that explains it.
        data: a JSONL file of conversations, as the recipe will name it; None for a data set of the hub.
        gpus: the machine, as `--gpus` took it; "" if none was named.
        processes: training processes.
    """

    verifier: VerifierSection
    facts: VerifierFacts
    config: SpeculatorModelConfig
    keys: Mapping[str, str]
    data: str | None
    gpus: str
    processes: int

    @property
    def name(self) -> str:
        """The recipe's name: algorithm and verifier."""
        short = re.sub(r"[^a-z0-9]+", "_", self.verifier.short_name.lower()).strip("_")
        return f"{self.config.speculators_model_type}_{short or 'verifier'}"

    @property
    def max_tokens(self) -> int:
        """Length at which a conversation is cut."""
        return min(MAX_TOKENS, int(self.facts.max_position_embeddings))


def published_dtype(facts: VerifierFacts) -> str | None:
    """Reads the precision of the published weights; None if config.json does not say, or says another one."""
    named = facts.get("dtype") or facts.get("torch_dtype")
    return named if named in DTYPES else None


def starter_text(starter: Starter) -> str:
    """Writes the recipe's file."""
    blocks = (_head, _verifier, _data, _algorithm, _schedule, _benchmark)
    return "\n\n".join("\n".join(block(starter)) for block in blocks) + "\n"


def _line(key: str, value: Any, comment: str = "") -> str:
    text = f"{key} = {value if isinstance(value, _Verbatim) else toml_text(value)}"
    return f"{text:<{_WIDTH}}# {comment}" if comment else text


class _Verbatim(str):
    """A value that is spelled already."""


def _head(starter: Starter) -> list[str]:
    name, short = starter.config.speculators_model_type, starter.verifier.short_name
    return [
        _line("format", 1),
        _line("name", starter.name, "run folders begin with it"),
        _line("version", "1.0.0", "raise it when the meaning of the recipe changes"),
        _line("summary", f"{name} for {short}"),
        *([_line("hardware", f"{starter.gpus}, planned")] if starter.gpus else []),
        _line("seed", 0),
        "",
        "# Written by spec init. Every key that is not here has its default: spec show FILE --resolved lists them, and",
        "# spec show FILE --why KEY explains one. Nothing here has been measured with this verifier.",
    ]


def _verifier(starter: Starter) -> list[str]:
    section, published = starter.verifier, published_dtype(starter.facts)
    lines = ["[verifier]", _line("model", section.model)]
    if section.revision:
        lines.append(_line("revision", section.revision, "pinned: another commit may be another verifier"))
    elif section.kind == "hub":
        lines.append('# revision = "..."  # a commit: without it, the verifier may change under the same name')
    why = "as the weights are published" if published else "config.json names no precision of the weights"
    return [*lines, _line("dtype", section.dtype, why)]


def _data(starter: Starter) -> list[str]:
    states = len(starter.config.layer_ids(starter.facts.num_hidden_layers)) + 1
    kilobytes = states * starter.facts.hidden_size * 2 / 1000
    if starter.data is None:
        sources = [{"path": CHATS, "split": "train_sft", "take": 50_000}]
        lines = ["# A data set of the hub. Conversations like those that the server will see draft better."]
    else:
        sources, lines = [{"path": starter.data}], []
    return [
        "[data]",
        *lines,
        _line("sources", sources),
        _line("max_tokens", starter.max_tokens, "a longer conversation is cut here"),
        _line("hidden_states", "online", f'"cached" needs {kilobytes:.3g} kB of disk per token'),
        "# The verifier rewrites the answers, so that the draft learns what it says; that takes time before training:",
        "# regenerate = { max_new_tokens = 160, temperature = 0.0 }",
    ]


def _algorithm(starter: Starter) -> list[str]:
    values = {key: getattr(starter.config, key) for key in starter.keys}
    ids = ", ".join(map(str, starter.config.layer_ids(starter.facts.num_hidden_layers)))
    lines = ["[algorithm]", _line("name", starter.config.speculators_model_type)]
    lines += [_line(key, value, starter.keys[key]) for key, value in values.items()]
    return [*lines, f"# It reads the verifier's states {ids} of {starter.facts.num_hidden_layers}."]


def _schedule(starter: Starter) -> list[str]:
    rows = f"{ROWS} rows of {starter.max_tokens} tokens"
    if starter.processes > 1:
        rows += f" on each of {starter.processes} processes"
    return [
        "[schedule]",
        _line("epochs", 2),
        _line("tokens_per_step", ROWS * starter.processes * starter.max_tokens, rows),
        _line("optimizer", {"name": "adamw", "lr": 1e-4}, "a usual rate, not tuned"),
    ]


def _benchmark(starter: Starter) -> list[str]:
    numbers = [k for k in NUM_TOKENS if not too_many_drafts(starter.config, [k])]
    if starter.data is None:
        suites: list[Any] = [{"name": "held_out", "path": CHATS, "split": "test_sft", "take": 80}]
        why = "conversations that training does not see"
    else:
        suites, why = ["quickstart"], "prompts that come with the package; a file of your own: { name, path }"
    most = starter.config.max_drafts()
    return [
        "[benchmark]",
        f"# {why[0].upper()}{why[1:]}.",
        _line("suites", suites),
        _line("num_speculative_tokens", numbers or [most[0] if most else 1], "measured; an export takes the best"),
        _line("temperature", [0.0], "greedy; 1.0 samples"),
    ]
