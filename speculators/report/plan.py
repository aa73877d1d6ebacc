"""Tables of a plan: its stages, the values derived from it, its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speculators.cost.costs import Costs
from speculators.cost.estimate import DeviceEstimate, Estimate
from speculators.cost.history import StageTime
from speculators.exchange.servable import Serving, servers_line
from speculators.files.disk import size_text
from speculators.recipe.decoder import own_shape
from speculators.recipe.plan import Plan
from speculators.report.progress import duration
from speculators.report.recipe import plain_table


def plan_tables(
    plan: Plan,
    done: Mapping[str, bool] | None = None,
    estimate: Estimate | None = None,
    serving: Sequence[Serving] = (),
) -> RenderableType:
    """Renders the stages of a plan, its derived values and, if they are known, its servers and costs.

    Args:
        done: whether the output of a stage is on disk, for the stages where that is known.
        serving: whether each server reads the drafts.
    """
    values = plain_table()
    values.add_column(style="name")
    values.add_column(overflow="fold")
    for name, value in _derived(plan).items():
        values.add_row(name, escape(value))
    if serving:
        values.add_row("servable by", escape(servers_line(serving)))
    reasons = [Text(f"not {each.server}: {reason}", style="note") for each in serving for reason in each.reasons]
    title = Text.assemble((plan.run_name, "title"), ("  ", ""), (plan.recipe.summary, "note"))
    parts: list[RenderableType] = [title, Text(), _stages(plan, done or {}, estimate), Text(), values, *reasons]
    return Group(*parts, *(_cost_tables(estimate) if estimate else []))


def _stages(plan: Plan, done: Mapping[str, bool], estimate: Estimate | None) -> Table:
    devices = estimate.devices if estimate else ()
    columns = ["on disk"] * bool(done) + ["tokens", "FLOPs"] * bool(estimate)
    table = plain_table("stage", "fingerprint", *columns, *(f"time, {each.device.name}" for each in devices))
    tokens, flops = (estimate.costs.tokens(), estimate.costs.flops()) if estimate else ({}, {})
    for stage in plan.stages:
        cells = [{True: "yes", False: "no", None: "?"}[done.get(stage.name)]] if done else []
        if estimate:
            bound = _bound(estimate.costs)
            cells += [_number(tokens.get(stage.name), bound), _flops(flops.get(stage.name), bound)]
        cells += [_time(each.times.get(stage.name)) for each in devices]
        table.add_row(stage.name, stage.fingerprint[:8], *cells)
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
    if departs := _departures(plan):
        values["its own shape"] = departs
    return values | {f"parameters, {part}": f"{count:,}" for part, count in plan.parameters.items()}


def _departures(plan: Plan) -> str:
    """Lists the sizes in which the draft departs from the verifier by itself, with the reasons."""
    set_here = plan.recipe.algorithm.config.decoder
    reasons: dict[str, list[str]] = {}
    for key, (value, why) in own_shape(plan.facts).items():
        if key not in set_here:
            reasons.setdefault(why, []).append(f"{key} {value:,}")
    return "; ".join(f"{', '.join(sizes)} ({why})" for why, sizes in reasons.items())


def _cost_tables(estimate: Estimate) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(), _amount(estimate.costs), Text(), _memory(estimate.devices)]
    parts += [Text(), _disk(estimate), Text(), *(Text(note, style="note") for note in estimate.notes)]
    return [*parts, *(Text(f"warning: {warning}", style="warn") for warning in estimate.warnings)]


def _bound(costs: Costs) -> str:
    """The sign before figures that are upper bounds."""
    return "" if costs.amount.counted else "<= "


def _amount(costs: Costs) -> Table:
    amount, row, verifier, bound = costs.amount, costs.row, costs.verifier, _bound(costs)
    table = plain_table("data and work", "")
    table.add_row("conversations", _number(amount.conversations, bound))
    table.add_row("updates", _number(amount.updates, bound))
    table.add_row("supervised", f"{bound}{amount.supervised:.0%} of the tokens")
    table.add_row("one row", _flops(row.row_flops))
    if row.update_flops:
        table.add_row("one update's optimizer", f"{_flops(row.update_flops)}, in every process")
    table.add_row("verifier", f"{verifier.parameters:,} parameters, {2 * verifier.products:,} FLOPs per token")
    return table


def _memory(devices: Sequence[DeviceEstimate]) -> Table:
    table = plain_table("memory per process, training", *(each.device.name for each in devices))
    for part in devices[0].memory:
        table.add_row(part, *(size_text(each.memory[part]) for each in devices))
    totals = []
    for each in devices:
        capacity = each.device.memory_bytes
        of_capacity = f" of {size_text(capacity)}" if capacity else ""
        over = capacity is not None and each.memory_total > capacity
        totals.append(f"[{'bad' if over else 'good'}]{size_text(each.memory_total)}[/]{of_capacity}")
    table.add_row("[title]total[/]", *totals)
    table.add_row("verifier alone, outside training", *(size_text(each.memory_verifier) for each in devices))
    table.add_row("received per update", *(_moved(each.communication) for each in devices))
    return table


def _moved(communication: Mapping[str, int]) -> str:
    if not communication:
        return "nothing"
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in communication.items())
    return f"{size_text(sum(communication.values()))} ({parts})"


def _disk(estimate: Estimate) -> Table:
    table, bound = plain_table("disk", ""), _bound(estimate.costs)
    for part, size in estimate.costs.disk().items():
        table.add_row(
            part, "?" if size is None else f"{bound if part == 'hidden states' and size else ''}{size_text(size)}"
        )
    if (reading := estimate.devices[0].reading) > 0:
        table.add_row("read per update", size_text(reading))
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


def _time(time: StageTime | None) -> str:
    return "" if time is None else f"{duration(time.seconds)} {time.how}"
