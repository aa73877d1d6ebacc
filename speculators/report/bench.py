"""The acceptance tables, rendered from a benchmark's JSON values: a fresh result and a kept one look the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Values = Mapping[str, Any]


def bench_tables(result: Values) -> RenderableType:
    """Returns every table of a benchmark, and the definitions that its numbers go by."""
    where = f"{result['verifier']}, {result['dtype']}, {result['device']}, {result['threads']} threads"
    parts: list[RenderableType] = [
        Text.assemble(("\nacceptance of ", "title"), (result["speculator"], "name"), (f"  ({where})", "note"))
    ]
    groups: dict[tuple[str, float], list[Values]] = {}
    for setting in result["settings"]:
        groups.setdefault((setting["suite"], setting["temperature"]), []).append(setting)
    for (suite, temperature), settings in groups.items():
        parts += [Text(), _main_table(suite, temperature, settings), _category_table(settings)]
        parts += [Text(words, style=style) for style, words in notes(settings)]
    parts.append(Text("\n" + definitions(result), style="note"))
    return Group(*parts)


def definitions(result: Values) -> str:
    """Returns the definition of every number: one line for settings that differ in K alone."""
    lines: dict[str, list[str]] = {}
    for setting in result["settings"]:
        k = f"K={setting['num_speculative_tokens']}"
        known = lines.setdefault(setting["definition"].replace(k, "K={}"), [])
        known += [k.removeprefix("K=")] if k.removeprefix("K=") not in known else []
    return "\n".join(line.replace("K={}", f"K={', '.join(ks)}") for line, ks in lines.items())


def _main_table(suite: str, temperature: float, settings: Sequence[Values]) -> Table:
    exact = settings[0]["exact"]
    table = Table(title=f"{suite}, T={temperature:g}, {exact['prompts']} prompts", title_justify="left", box=None)
    for column in (
        "drafts",
        "K",
        "tau (95%)",
        "accepted by position",
        "given reached",
        "drafted",
        "live tau",
        "draft + verify ms",
        "tokens/s",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column == "drafts" else "right", header_style="title")
    for setting in settings:
        live = setting["live"]
        speed = live["speed"] if live else None
        table.add_row(
            "speculator",
            *acceptance_cells(setting["num_speculative_tokens"], setting["exact"]),
            *_live(live),
            *_speed(speed),
        )
    # Baselines were decoded at the largest K only.
    largest = max(settings, key=lambda setting: int(setting["num_speculative_tokens"]))
    for baseline in largest["baselines"]:
        tau = baseline["live_tau"]
        live_cell = "" if tau is None else f"{tau:.3f}"
        cells = acceptance_cells(largest["num_speculative_tokens"], baseline["acceptance"])
        table.add_row(escape(baseline["name"]), *cells, live_cell, *_speed(baseline["speed"]))
    live = largest["live"]
    if live:
        table.add_row("plain", "", "1.000", "", "", "", "", "", f"{live['speed']['plain']:.1f}", "1.00x")
    return table


def acceptance_cells(k: int, acceptance: Values) -> tuple[str, ...]:
    """Returns K, tau with its interval, both rates by position, and the tokens drafted a round."""
    low, high = acceptance["tau_interval"]
    tau = f"{number_text(acceptance['tau'], 3)} ({number_text(low, 2)} to {number_text(high, 2)})"
    drafted = number_text(acceptance["drafted"], 2)
    return (
        str(k),
        tau,
        rates_text(acceptance["by_position"]),
        rates_text(acceptance["by_position_conditional"]),
        drafted,
    )


def _live(live: Values | None) -> tuple[str]:
    if live is None:
        return ("not asked",)
    style, words = verdict(live["agreement"])
    return (f"{number_text(live['acceptance']['tau'], 3)} [{style}]{words}[/]",)


def verdict(agreement: Values) -> tuple[str, str]:
    """Returns (style, words) of whether live agrees with replay."""
    style = {"agrees": "good", "disagrees": "bad"}.get(agreement["verdict"], "note")
    return style, agreement["verdict"].upper() if style == "bad" else agreement["verdict"]


def _speed(speed: Values | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    cost = f"{1e3 * speed['draft_seconds']:.1f} + {1e3 * speed['verify_seconds']:.1f}"
    flag = " [bad]unmatched baseline[/]" if speed["unmatched_baseline"] else ""
    return cost, f"{speed['speculative']:.1f}", f"{speed['speed_up']:.2f}x{flag}"


def _category_table(settings: Sequence[Values]) -> Table:
    """Returns tau of each category for each K; with its interval and positions only for the largest: it must fit."""
    by_k = sorted(settings, key=lambda setting: int(setting["num_speculative_tokens"]))
    *smaller, largest = by_k
    k = largest["num_speculative_tokens"]
    table = Table(title="by category", title_justify="left", box=None)
    taus = [f"tau K={setting['num_speculative_tokens']}" for setting in smaller]
    for name in ("category", "prompts", *taus, f"tau K={k} (95%)", f"accepted by position, K={k}"):
        table.add_column(name, justify="left" if name == "category" else "right", header_style="title")
    for category, acceptance in largest["by_category"].items():
        _, tau, rates, *_ = acceptance_cells(k, acceptance)
        others = [number_text(setting["by_category"][category]["tau"], 3) for setting in smaller]
        table.add_row(escape(category) or "-", str(acceptance["prompts"]), *others, tau, rates)
    return table


def notes(settings: Sequence[Values]) -> list[tuple[str, str]]:
    """Returns (style, words) of what a reader must know beside the numbers of one suite and temperature."""
    found: list[tuple[str, str]] = []
    if settings[0]["cut_prompts"]:
        told = f"{settings[0]['cut_prompts']} responses leave the verifier's own output: cut there, "
        found.append(("note", told + f"{settings[0]['cut_tokens']} tokens left out"))
    if settings[0]["replaced_prompts"]:
        told = (
            f"{settings[0]['replaced_prompts']} answers of the suite are not this verifier's output: it wrote others, "
        )
        found.append(("note", told + "so tau is over other text than where the suite's own answers hold"))
    if settings[0]["note"]:
        found.append(("note", settings[0]["note"]))
    for setting in settings:
        live = setting["live"]
        if not live:
            continue
        agreement, k = live["agreement"], setting["num_speculative_tokens"]
        words = f"K={k}: on {live['acceptance']['prompts']} prompts replay predicts {agreement['predicted_tau']:.4f}, "
        words += f"live measures {live['acceptance']['tau']:.4f} ({agreement['criterion']})"
        if agreement["own_tau"] is not None:
            words += f"; over the verifier's own responses replay says {agreement['own_tau']:.4f}"
        if agreement["near_ties"]:
            words += f"; {agreement['near_ties']} responses compared up to a near-tie of the verifier's logits"
        found.append(("note", words))
        if not agreement["agrees"]:
            found.append(("bad", f"K={k}: {agreement['gap']}"))
        if agreement["untold"]:
            found.append(("note", f"K={k}: {agreement['untold']} (--live N takes more)"))
    return found + _cost(settings)


def _cost(settings: Sequence[Values]) -> list[tuple[str, str]]:
    """Returns what one more drafted token costs, by the rounds of the smallest and the largest K; nothing if noise."""
    by_k = {each["num_speculative_tokens"]: each["drafted_cost"] for each in settings if each["live"]}
    if not by_k or (cost := by_k[max(by_k)]) is None:
        return []
    words = f"from the rounds of K={min(by_k)} and K={max(by_k)}: one more drafted token costs {cost:.2f} of a token"
    return [
        ("note", f"{words} without drafts, draft and verification; one that is accepted less often slows decoding down")
    ]


def rates_text(rates: Sequence[float | None]) -> str:
    """Returns rates by position; "-" where a position was never reached."""
    return " ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)


def number_text(value: float | None, digits: int) -> str:
    """Returns a number with so many digits, "-" for none."""
    return "-" if value is None else f"{value:.{digits}f}"
