"""What a recipe is known to reach, held against what a run measured."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tomli

from speculators.errors import RecipeError
from speculators.recipe.schema import Expect
from speculators.structure.origin import key_lines

_SETTING = re.compile(r"(.+)/K=(\d+)/T=(\d+(?:\.\d+)?)")


def setting_key(suite: str, k: int, temperature: float) -> str:
    """Returns the name of a benchmark's setting, "SUITE/K=5/T=0"."""
    return f"{suite}/K={k}/T={temperature:g}"


def band_key(written: str) -> str:
    """Returns the name of the setting that a band speaks of: T=0.0 is T=0; what is no setting stays as it is."""
    found = _SETTING.fullmatch(written)
    return setting_key(found[1], int(found[2]), float(found[3])) if found else written


def compare_bands(expect: Mapping[str, Expect], settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns each band with the acceptance length that was measured and where it lies.

    Args:
        expect: bands by setting, "SUITE/K=5/T=0".
        settings: of a benchmark, as JSON values.

    Returns:
        A row for each band; `place` is "inside", "below", "above", or "not measured" where the benchmark lacks it.
    """
    measured = {
        setting_key(each["suite"], each["num_speculative_tokens"], each["temperature"]): each["exact"]["tau"]
        for each in settings
    }
    rows = []
    for name, band in expect.items():
        tau, (low, high) = measured.get(band_key(name)), band.tau
        if tau is None:
            place = "not measured"
        else:
            place = "below" if tau < low else "above" if tau > high else "inside"
        rows.append({"setting": name, "tau": tau, "band": [low, high], "place": place, "source": band.source})
    return rows


def band_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one line a band in words."""
    lines = []
    for row in rows:
        band = f"{row['band'][0]:g} to {row['band'][1]:g} ({row['source']})"
        if row["tau"] is None:
            lines.append(f"{row['setting']}: expected {band}; not measured")
        else:
            lines.append(f"{row['setting']}: tau {row['tau']:.3f} is {row['place']} what is expected, {band}")
    return lines


def without_bands(text: str) -> str:
    """Returns the TOML text of a recipe without `[expect]`: of what is left every comment and blank stays as it was.

    Raises:
        RecipeError: the text is written so that the bands cannot be told from the rest.
    """
    lines = text.splitlines(keepends=True)
    starts = sorted((line - 1, path[0] == "expect") for path, line in key_lines(text).items())
    left = lines[: starts[0][0]] if starts else lines
    for (start, bands), (end, more) in itertools.pairwise([*starts, (len(lines), False)]):
        if not bands:
            left += lines[start:end]
        elif not more:
            # Comments before what comes next are about that.
            told = itertools.takewhile(lambda line: re.match(r"\s*(#|$)", line), reversed(lines[start:end]))
            left += itertools.dropwhile(str.isspace, reversed(list(told)))
    found = "".join(left).rstrip() + "\n"
    if tomli.loads(found) != {key: value for key, value in tomli.loads(text).items() if key != "expect"}:
        raise RecipeError("[expect] cannot be told from the rest of the file: write it as a table, at the end")
    return found
