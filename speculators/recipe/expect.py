"""`[expect]`: compares the acceptance lengths that a recipe is known to reach with those that a run measured."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import attrs
import tomli

from speculators.errors import RecipeError
from speculators.recipe.schema import Expect
from speculators.structure.origin import key_lines

_SETTING = re.compile(r"(.+)/K=(\d+)/T=(\d+(?:\.\d+)?)")


def setting_key(suite: str, k: int, temperature: float) -> str:
    """Names a setting of a benchmark: "SUITE/K=5/T=0"."""
    return f"{suite}/K={k}/T={temperature:g}"


def band_key(written: str) -> str:
    """Normalises the setting that a band names, T=0.0 to T=0; anything else stays as it is."""
    setting = _SETTING.fullmatch(written)
    return setting_key(setting[1], int(setting[2]), float(setting[3])) if setting else written


@attrs.frozen(kw_only=True)
class BandResult:
    """A band of `[expect]` beside the acceptance length that was measured.

    Attributes:
        setting: as written, "SUITE/K=5/T=0".
        tau: measured acceptance length; None if the benchmark lacks the setting.
        band: lowest and highest tau to expect.
        place: "inside", "below", "above", or "not measured".
        source: the measurement behind the band.
    """

    setting: str
    tau: float | None
    band: tuple[float, float]
    place: str
    source: str


def compare_bands(expect: Mapping[str, Expect], taus: Mapping[str, float]) -> list[BandResult]:
    """Compares the measured acceptance lengths with the bands of a recipe.

    Args:
        expect: bands by setting, "SUITE/K=5/T=0".
        taus: measured acceptance lengths by setting, named by `setting_key`.
    """
    results = []
    for name, band in expect.items():
        tau, (low, high) = taus.get(band_key(name)), band.tau
        if tau is None:
            place = "not measured"
        else:
            place = "below" if tau < low else "above" if tau > high else "inside"
        results.append(BandResult(setting=name, tau=tau, band=(low, high), place=place, source=band.source))
    return results


def band_lines(results: Sequence[BandResult]) -> list[str]:
    """Formats one line for each band."""
    lines = []
    for result in results:
        low, high = result.band
        band = f"{low:g} to {high:g} ({result.source})"
        if result.tau is None:
            lines.append(f"{result.setting}: expected {band}; not measured")
        else:
            lines.append(f"{result.setting}: tau {result.tau:.3f} is {result.place} the expected band, {band}")
    return lines


def without_bands(text: str) -> str:
    """Cuts `[expect]` out of a recipe's TOML text; every other comment and blank line stays as it was.

    Raises:
        RecipeError: the text is written so that the bands cannot be separated from the rest.
    """
    lines = text.splitlines(keepends=True)
    starts = sorted((line - 1, path[0] == "expect") for path, line in key_lines(text).items())
    left = lines[: starts[0][0]] if starts else lines
    for (start, is_band), (end, next_is_band) in itertools.pairwise([*starts, (len(lines), False)]):
        if not is_band:
            left += lines[start:end]
        elif not next_is_band:
            # Comments above the next table belong to that table.
            comments = itertools.takewhile(lambda line: re.match(r"\s*(#|$)", line), reversed(lines[start:end]))
            left += itertools.dropwhile(str.isspace, reversed(list(comments)))
    # The lines were cut by a scan, not by a parser, so the result is parsed: a wrong cut would be another recipe.
    copy = "".join(left).rstrip() + "\n"
    if tomli.loads(copy) != {key: value for key, value in tomli.loads(text).items() if key != "expect"}:
        raise RecipeError("[expect] cannot be separated from the rest of the file: write it as a table, at the end")
    return copy
