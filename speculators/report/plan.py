"""Tables of a plan for people: stages, what it means here, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.cost.costs import size_text
from speculators.recipe.plan import Plan
from speculators.report.progress import duration
from speculators.report.recipe import plain_table


def plan_tables(
    plan: Plan, done: Mapping[str, bool] | None = None, costs: Mapping[str, Any] | None = None
) -> RenderableType:
    """Returns the stages, the derived values of a plan and, where they are known, its costs.

    Args:
        done: whether the output of a stage is on disk, for those stages of which it is known.
        costs: as `spec plan --json` has them.
    """
    values = plain_table()
    values.add_column(style="name")
    values.add_column(overflow="fold")
    for name, value in _derived(plan).items():
        values.add_row(name, escape(value))
    title = Text.assemble((plan.run_name, "title"), ("  ", ""), (plan.recipe.summary, "note"))
    parts: list[RenderableType] = [title, Text(), _stages(plan, done or {}, costs), Text(), values]
    return Group(*parts, *(_cost_tables(costs) if costs else []))


def _stages(plan: Plan, done: Mapping[str, bool], costs: Mapping[str, Any] | None) -> Table:
    devices = costs["devices"] if costs else []
    columns = ["on disk"] * bool(done) + ["tokens", "FLOPs"] * bool(costs)
    table = plain_table("stage", "fingerprint", *columns, *(f"time, {device['device']}" for device in devices))
    for stage in plan.stages:
        cells = [{True: "yes", False: "no", None: "?"}[done.get(stage.name)]] if done else []
        if costs:
            bound = "" if costs["amount"]["counted"] else "<= "
            cells += [_number(costs["tokens"].get(stage.name), bound), _flops(costs["flops"].get(stage.name), bound)]
        cells += [_time(device["seconds"].get(stage.name)) for device in devices]
        table.add_row(stage.name, stage.fingerprint[:16], *cells)
    return table


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
    }
    return values | {f"parameters, {part}": f"{count:,}" for part, count in plan.parameters.items()}


def _cost_tables(costs: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(), _amount(costs), Text(), _memory(costs["devices"])]
    parts += [Text(), _disk(costs)]
    if simulation := costs.get("simulation"):
        parts += [Text(), _simulation(simulation)]
    notes = [*costs["notes"], *(simulation["notes"] if simulation else [])]
    parts += [Text(), *(Text(note, style="note") for note in notes)]
    return [*parts, *(Text(f"warning: {warning}", style="warn") for warning in costs["warnings"])]


def _amount(costs: Mapping[str, Any]) -> Table:
    amount, row = costs["amount"], costs["row"]
    bound = "" if amount["counted"] else "<= "
    table = plain_table("data and work", "")
    table.add_row("conversations", _number(amount["conversations"], bound))
    table.add_row("updates", _number(amount["updates"], bound))
    table.add_row("supervised", f"{bound}{amount['supervised']:.0%} of the tokens")
    table.add_row("one row", _flops(row["row_flops"]))
    if row["update_flops"]:
        table.add_row("one update's optimizer", f"{_flops(row['update_flops'])}, in every process")
    verifier = costs["verifier"]
    table.add_row("verifier", f"{verifier['parameters']:,} parameters, {2 * verifier['products']:,} FLOPs a token")
    return table


def _memory(devices: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("memory a process, training", *(device["device"] for device in devices))
    for part in devices[0]["memory"]:
        table.add_row(part, *(size_text(device["memory"][part]) for device in devices))
    totals = []
    for device in devices:
        room = f" of {size_text(device['capacity'])}" if device["capacity"] else ""
        over = device["capacity"] is not None and device["memory_total"] > device["capacity"]
        totals.append(f"[{'bad' if over else 'good'}]{size_text(device['memory_total'])}[/]{room}")
    table.add_row("[title]total[/]", *totals)
    table.add_row("verifier alone, capture and bench", *(size_text(device["memory_verifier"]) for device in devices))
    table.add_row("received an update", *(_moved(device["communication"]) for device in devices))
    return table


def _moved(communication: Mapping[str, int]) -> str:
    if not communication:
        return "nothing"
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in communication.items())
    return f"{size_text(sum(communication.values()))} ({parts})"


def _disk(costs: Mapping[str, Any]) -> Table:
    table = plain_table("disk", "")
    bound = "" if costs["amount"]["counted"] else "<= "
    for part, size in costs["disk"].items():
        table.add_row(
            part, "?" if size is None else f"{bound if part == 'hidden states' and size else ''}{size_text(size)}"
        )
    if (reading := costs["devices"][0]["reading"]) > 0:
        table.add_row("read an update", size_text(reading))
    return table


def _simulation(simulation: Mapping[str, Any]) -> Table:
    columns = ("nodes", "processes", "rows a process", "tokens an update", "compute", "communication", "reading")
    table = plain_table(*columns, "update", "tokens/s", "of linear")
    rows = simulation["rows"]
    for row in rows:
        linear = row["tokens_per_second"] / (rows[0]["tokens_per_second"] * row["nodes"] / rows[0]["nodes"])
        grown = "*" if row["grown"] else ""
        times = (row[f"{part}_seconds"] for part in ("compute", "communication", "reading", "step"))
        table.add_row(
            f"{row['nodes']}",
            f"{row['processes']:,}",
            f"{row['rows']}",
            f"{row['tokens_per_step']:,}{grown}",
            *(f"{1000 * time:,.0f} ms" for time in times),
            f"{row['tokens_per_second']:,.0f}",
            f"{linear:.0%}",
        )
    return table


def _number(value: int | None, bound: str = "") -> str:
    return "?" if value is None else f"{bound}{value:,}"


def _flops(value: float | None, bound: str = "") -> str:
    if value is None:
        return "?" if bound else ""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{bound}{value / unit:.3g} {name}FLOP"
    return f"{bound}{value / 1e6:.3g} MFLOP"


def _time(told: Mapping[str, Any] | None) -> str:
    return "" if told is None else f"{duration(told['seconds'])} {told['how']}"
