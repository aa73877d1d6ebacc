"""Tables of recipes and plans for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.recipe.plan import Plan


def values_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns one line a value: its TOML path, the value, where it comes from."""
    table = _table()
    table.add_column("key", style="name", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", style="note", overflow="fold")
    for path, row in rows.items():
        table.add_row(escape(path), escape(_toml(row["value"])), escape(str(row["origin"])))
    return table


def listing(
    recipes: Sequence[Mapping[str, Any]], algorithms: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> RenderableType:
    """Returns the recipes with what they reach, the algorithms and the runs."""
    table = _table("recipe", "algorithm", "version", "summary", "reaches")
    for recipe in recipes:
        bands = "\n".join(f"{name}: {low:g} to {high:g}" for name, (low, high) in recipe["expect"].items())
        cells = (recipe["name"], recipe["algorithm"], recipe["version"], recipe["summary"], bands or "not measured yet")
        table.add_row(*map(escape, cells))
    parts: list[RenderableType] = [table, Text.assemble(("\nalgorithms ", "title"), ", ".join(algorithms) or "none")]
    if runs:
        done = _table("run", "trained", "measured")
        for run in runs:
            done.add_row(escape(run["name"]), *("yes" if run[key] else "no" for key in ("trained", "measured")))
        parts += [Text(), done]
    else:
        parts.append(Text.assemble(("runs       ", "title"), "none here; spec run quickstart makes the first"))
    return Group(*parts)


def plan_tables(plan: Plan, done: Mapping[str, bool] | None = None) -> RenderableType:
    """Returns the stages and the derived values of a plan.

    Args:
        done: whether the output of a stage is on disk, for those stages of which it is known.
    """
    stages = _table("stage", "fingerprint", *(["on disk"] if done else []))
    for stage in plan.stages:
        known = [{True: "yes", False: "no", None: "?"}[done.get(stage.name)]] if done else []
        stages.add_row(stage.name, stage.fingerprint[:16], *known)
    values = _table()
    values.add_column(style="name")
    values.add_column(overflow="fold")
    for name, value in _derived(plan).items():
        values.add_row(name, escape(value))
    title = Text.assemble((plan.run_name, "title"), ("  ", ""), (plan.recipe.summary, "note"))
    return Group(title, Text(), stages, Text(), values)


def _derived(plan: Plan) -> dict[str, str]:
    facts, decoder = plan.facts, plan.transformer_layer_config
    layers = ", ".join(map(str, plan.target_layer_ids))
    steps = f"{plan.steps}" if plan.steps else f"{plan.recipe.schedule.epochs} epochs; steps are known once prepared"
    rope = ", ".join(f"{key} {value}" for key, value in decoder["rope_parameters"].items())
    values = {
        "verifier": f"{plan.recipe.verifier.model} ({facts.num_hidden_layers} layers, hidden {facts.hidden_size})",
        "reads layers": layers,
        "drafts": f"{plan.draft_vocab_size:,} of {facts.vocab_size:,} tokens",
        "draft decoder": f"{decoder['num_hidden_layers']} x {decoder['model_type']}, "
        f"{decoder['num_attention_heads']}/{decoder['num_key_value_heads']} heads of {decoder['head_dim']}, "
        f"intermediate {decoder['intermediate_size']:,}",
        "positions": f"{decoder['max_position_embeddings']:,}; {rope}",
        "step": f"{plan.rows_per_step} rows of {plan.row_tokens:,} tokens over {plan.world_size} process(es)",
        "length": steps,
        "hidden states": plan.recipe.data.hidden_states,
        "bytes a token": f"{_state_bytes(plan):,} of hidden states",
    }
    return values | {f"parameters, {part}": f"{count:,}" for part, count in plan.parameters.items()}


def _state_bytes(plan: Plan) -> int:
    size = 4 if plan.recipe.data.states_dtype == "float32" else 2
    return (len(plan.target_layer_ids) + 1) * plan.facts.hidden_size * size


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="title")
    for index, column in enumerate(columns):
        table.add_column(column, style="name" if index == 0 else None, overflow="fold")
    return table


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
