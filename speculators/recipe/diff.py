"""What two recipes or runs differ in by meaning, what that invalidates, and whether results compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.config import VerifierFacts
from speculators.errors import ArtifactError
from speculators.recipe.fingerprint import file_digest
from speculators.recipe.origin import path_text
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten, leaves

# What a recipe is called, what it is for, how it is held to its word and who is told: no part of what it does.
_NAMES = ("format", "name", "version", "summary", "hardware", "extends", "tracking", "reproduce", "expect")
# Values that name content by a path; the same content under another path is no difference.
_CONTENT = ("path", "model")
ABSENT = "not there"


@attrs.frozen(kw_only=True)
class Side:
    """One of two recipes or runs.

    Attributes:
        name: as it was asked for.
        values: every value by its TOML path, defaults included.
        origins: where each was written.
        stages: fingerprint and inputs of each stage; empty where the verifier is not known.
        facts: the verifier's config.json, where it is known.
        run: its folder, None for a recipe.
    """

    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    stages: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    facts: VerifierFacts | None = None
    run: Path | None = None

    @classmethod
    def of_recipe(cls, name: str, recipe: Recipe, plan: Plan | None = None) -> Side:
        """Returns a recipe's side; with a plan its stages are known."""
        return cls(
            name=name,
            values=flatten(recipe),
            origins={path: str(origin) for path, origin in recipe.origins.items()},
            stages={stage.name: attrs.asdict(stage) for stage in plan.stages} if plan else {},
            facts=plan.facts if plan else None,
        )

    @classmethod
    def of_run(cls, name: str, folder: Path) -> Side:
        """Returns a run's side, from what it wrote down.

        Raises:
            ArtifactError: `plan.json` is missing or damaged.
        """
        file = folder / "plan.json"
        try:
            plan = json.loads(file.read_text(encoding="utf-8"))
            values = {path_text(path): value for path, value in leaves((), plan["recipe"])}
            stages = {stage["name"]: stage for stage in plan["stages"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "spec run of its recipe writes it again"
            raise ArtifactError(f"{file}: missing or damaged: {error!r}", hint=hint) from error
        return cls(name=name, values=values, origins=dict.fromkeys(values, str(file)), stages=stages, run=folder)


@attrs.frozen(kw_only=True)
class Change:
    """A value that differs.

    Attributes:
        path: TOML path.
        before, after: the values; ABSENT where a side has no such key.
        before_from, after_from: where they were written.
        consequence: one line, or "".
    """

    path: str
    before: Any
    after: Any
    before_from: str
    after_from: str
    consequence: str

    @property
    def section(self) -> str:
        """The first part of the path."""
        return self.path.partition(".")[0].partition("[")[0]


@attrs.frozen(kw_only=True)
class Verdict:
    """Whether results of both sides compare.

    Attributes:
        comparable: None where it cannot be known.
        reasons: what decides it.
    """

    comparable: bool | None
    reasons: tuple[str, ...]


def changes(a: Side, b: Side) -> list[Change]:
    """Returns the values that differ by meaning, in the recipe's order."""
    paths = [path for path in dict.fromkeys([*a.values, *b.values]) if path.partition(".")[0] not in _NAMES]
    found = []
    for path in paths:
        before, after = (side.values.get(path, ABSENT) for side in (a, b))
        if not _same(path, before, after):
            found.append(
                Change(
                    path=path,
                    before=before,
                    after=after,
                    before_from=a.origins.get(path, ""),
                    after_from=b.origins.get(path, ""),
                    consequence=_consequence(path, before, after, a.facts or b.facts),
                )
            )
    return found


def stages(a: Side, b: Side) -> list[dict[str, str]]:
    """Returns each stage with what becomes of it: "reused", "runs again", or which side alone has it."""
    if not a.stages or not b.stages:
        return []
    found = []
    for name in dict.fromkeys([*a.stages, *b.stages]):
        if name not in a.stages or name not in b.stages:
            status = f"only in {a.name if name in a.stages else b.name}"
        else:
            status = "reused" if a.stages[name]["fingerprint"] == b.stages[name]["fingerprint"] else "runs again"
        found.append({"stage": name, "status": status})
    return found


def verdict(a: Side, b: Side) -> Verdict:
    """Returns whether acceptance lengths of both sides may be compared, and why (not)."""
    if not a.stages or not b.stages:
        return Verdict(comparable=None, reasons=("the stages of one side are not known",))
    if "bench" not in a.stages or "bench" not in b.stages:
        lacking = " and ".join(side.name for side in (a, b) if "bench" not in side.stages)
        return Verdict(comparable=False, reasons=(f"{lacking} measures nothing",))
    reasons = []
    if a.stages["verifier"]["fingerprint"] != b.stages["verifier"]["fingerprint"]:
        reasons.append(f"the verifiers differ ({_named(a, 'verifier.model')} / {_named(b, 'verifier.model')})")
    one, other = (side.stages["bench"]["inputs"] for side in (a, b))
    if one["suites"] != other["suites"]:
        reasons.append(f"the suites differ ({_suites(a, one)} / {_suites(b, other)})")
    words = {
        "dtype": "the verifier's precision",
        "max_new_tokens": "the length of the responses",
        "temperature": "the temperatures",
        "num_speculative_tokens": "the K",
    }
    for key, word in words.items():
        both = set(_list(one[key])) & set(_list(other[key]))
        if not both:
            reasons.append(f"{word} differ ({one[key]} / {other[key]})")
    if reasons:
        return Verdict(comparable=False, reasons=tuple(reasons))
    shared = [
        "the same verifier, suites and response length",
        *(
            f"at {name} {', '.join(f'{value:g}' for value in _list(one[key]) if value in _list(other[key]))}"
            for key, name in (("num_speculative_tokens", "K"), ("temperature", "T"))
        ),
    ]
    return Verdict(comparable=True, reasons=(", ".join(shared),))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _named(side: Side, path: str) -> str:
    return f"{side.values.get(path, '?')}@{side.stages['verifier']['fingerprint'][:8]}"


def _suites(side: Side, inputs: Mapping[str, Any]) -> str:
    names = [side.values.get(f"benchmark.suites[{index}].name", "?") for index in range(len(inputs["suites"]))]
    digests = [str(suite.get("sha256") or suite.get("revision") or "")[:4] for suite in inputs["suites"]]
    return ", ".join(f"{name}@{digest}" for name, digest in zip(names, digests, strict=True))


def _same(path: str, before: Any, after: Any) -> bool:
    if before == after and type(before) is type(after):
        return True
    if path.rpartition(".")[2] in _CONTENT and isinstance(before, str) and isinstance(after, str):
        files = Path(before), Path(after)
        return all(file.is_file() for file in files) and file_digest(files[0]) == file_digest(files[1])
    return False


def _consequence(path: str, before: Any, after: Any, facts: VerifierFacts | None) -> str:
    """Returns one line about what a change means; "" where nothing certain can be said."""
    told = _COUNTED.get(path)
    if told is not None and _counts(before) and _counts(after):
        return told(float(before), float(after), facts)
    for prefix, words in _WORDS.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return words
    return ""


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _vocabulary(before: float, after: float, facts: VerifierFacts | None) -> str:
    if facts is None:
        return f"{after - before:+,.0f} rows of the head"
    return f"{(after - before) * facts.hidden_size:+,.0f} parameters of the head"


_COUNTED = {
    "algorithm.draft_vocab_size": _vocabulary,
    "schedule.epochs": lambda a, b, _: f"{b / a:.3g} times the training",
    "schedule.max_steps": lambda a, b, _: f"{b / a:.3g} times the updates",
    "schedule.tokens_per_step": lambda a, b, _: (
        f"{b / a:.3g} times the tokens an update, {a / b:.3g} times the updates"
    ),
    "data.max_tokens": lambda _, b, __: f"conversations are cut at {b:,.0f} tokens",
}
# From the most particular path to the least.
_WORDS = {
    "verifier": "another verifier: nothing is reused, and results do not compare",
    "data.hidden_states": "where the states come from; they are the same, by a server but for rounding",
    "data.server": "where the server is, and how hard it is worked; the same states",
    "data": "other training data",
    "algorithm.target_layer_ids": "other hidden states: they are captured anew",
    "algorithm.name": "another algorithm: its other keys are its own",
    "algorithm": "trained anew",
    "schedule.checkpoint_every": "how often, not what: the same weights",
    "schedule.keep_checkpoints": "how many are kept, not what: the same weights",
    "schedule": "trained anew",
    "seed": "other initial weights and another order of the data",
    "distributed": "how the work is shared; the same recipe",
    "benchmark.live_prompts": "how much the live decode confirms; tau is the same",
    "benchmark.live_tokens": "how much the live decode confirms; tau is the same",
    "benchmark.baselines": "what is measured beside; tau is the same",
    "benchmark.suites": "measured on other prompts; the first suite also chooses the best checkpoint",
    "benchmark": "measured anew; a change of the largest K or the first T also chooses the checkpoint anew",
}


def as_values(a: Side, b: Side) -> dict[str, Any]:
    """Returns the whole comparison of the recipes as JSON values."""
    told = verdict(a, b)
    return {
        "a": a.name,
        "b": b.name,
        "changes": [{**attrs.asdict(change), "section": change.section} for change in changes(a, b)],
        "stages": stages(a, b),
        "comparable": told.comparable,
        "reasons": list(told.reasons),
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """Returns the comparison as Markdown, for a pull request."""
    lines = [f"### `{result['a']}` against `{result['b']}`", ""]
    if result["changes"]:
        lines += [f"| key | {result['a']} | {result['b']} | means |", "|---|---|---|---|"]
        lines += [
            f"| `{c['path']}` | {text(c['before'])} | {text(c['after'])} | {c['consequence']} |"
            for c in result["changes"]
        ]
    else:
        lines.append("No difference in meaning.")
    if result["stages"]:
        lines += ["", "Stages: " + "; ".join(f"{s['stage']} {s['status']}" for s in result["stages"]) + "."]
    lines += ["", f"**{headline(result['comparable'])}**: {'; '.join(result['reasons'])}."]
    for row in result.get("metrics", []):
        lines.append(f"* {metric_line(row)}")
    return "\n".join(lines) + "\n"


def headline(comparable: bool | None) -> str:
    """Returns the verdict in words."""
    return {True: "results compare", False: "not comparable", None: "comparable is not known"}[comparable]


def metric_line(row: Mapping[str, Any]) -> str:
    """Returns one difference of acceptance lengths in words."""
    place = f"{row['suite']}, K={row['num_speculative_tokens']}, T={row['temperature']:g}"
    low, high = row["interval"] or (None, None)
    between = f" (95%, paired by prompt: {low:+.3f} to {high:+.3f})" if low is not None else ""
    return f"{place}: tau {row['before']:.3f} -> {row['after']:.3f}, {row['after'] - row['before']:+.3f}{between}"


def text(value: Any) -> str:
    """Returns a value as TOML people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(text(item) for item in value)}]"
    return str(value)


def exit_code(result: Mapping[str, Any]) -> int:
    """Returns 0 where nothing differs in meaning, else 1."""
    return 1 if result["changes"] else 0
