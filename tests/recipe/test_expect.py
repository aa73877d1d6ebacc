"""Bands of `[expect]` are compared with what was measured."""

from __future__ import annotations

import pytest

from speculators.errors import RecipeError
from speculators.recipe.expect import band_lines, compare_bands, without_bands
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Expect

BAND = {"quickstart/K=5/T=0": Expect(tau=(1.6, 1.8), source="measured: somewhere")}


@pytest.mark.parametrize(
    ("tau", "place"), [(1.59, "below"), (1.6, "inside"), (1.7, "inside"), (1.8, "inside"), (1.81, "above")]
)
def test_a_figure_is_inside_below_or_above_its_band(tau: float, place: str) -> None:
    """The ends belong to the band."""
    (row,) = compare_bands(BAND, {"quickstart/K=3/T=0": 2.0, "quickstart/K=5/T=0": tau})
    assert (row.tau, row.place) == (tau, place)
    assert band_lines([row]) == [
        f"quickstart/K=5/T=0: tau {tau:.3f} is {place} the expected band, 1.6 to 1.8 (measured: somewhere)"
    ]


def test_a_band_that_was_not_measured_says_so() -> None:
    """A benchmark with another K does not pass silently."""
    (row,) = compare_bands(BAND, {"quickstart/K=3/T=0": 1.7})
    assert row.place == "not measured"
    assert "not measured" in band_lines([row])[0]


def test_a_band_is_found_however_its_temperature_is_written() -> None:
    """The check of a recipe reads T=0.0 as T=0, and so does the comparison."""
    (row,) = compare_bands({"quickstart/K=5/T=0.0": BAND["quickstart/K=5/T=0"]}, {"quickstart/K=5/T=0": 1.7})
    assert (row.tau, row.place) == (1.7, "inside")


def test_bands_belong_to_the_recipe_as_it_is_written() -> None:
    """Another seed is the same recipe; any other change makes one for which the bands were not measured."""
    bands = load_recipe("quickstart").expect
    assert set(bands) == {"quickstart/K=3/T=0", "quickstart/K=5/T=0"}
    assert load_recipe("quickstart", ["seed=7"]).expect == bands
    assert load_recipe("quickstart", ["benchmark.num_speculative_tokens=[3]"]).expect == {}
    own = load_recipe(
        "quickstart", ["schedule.epochs=1", 'expect={"quickstart/K=3/T=0"={tau=[1.2, 1.4], source="mine"}}']
    )
    assert own.expect["quickstart/K=3/T=0"].tau == (1.2, 1.4)


BAND_LINE = '"quickstart/K=5/T=0" = { tau = [1.6, 1.8], source = "measured" }\n'
BEFORE, AFTER = 'name = "a"   # mine\n\n', "# How it is measured.\n[benchmark]\nsuites  = []  # none\n"


@pytest.mark.parametrize(
    "bands",
    [
        f"[expect]   # three seeds\n{BAND_LINE}",
        f"[expect]\n# the first\n{BAND_LINE}# the second\n{BAND_LINE.replace('5', '3')}\n",
        '[expect."quickstart/K=5/T=0"]\ntau = [  # both\n  1.6,\n\n  # and\n  1.8,\n]\nsource = "measured"\n\n',
        f"expect.{BAND_LINE}\n",
    ],
)
def test_bands_are_cut_out_of_a_file_and_the_rest_stays_as_it_is_written(bands: str) -> None:
    """In any form; comments inside go with them, comments above the next table stay with that table."""
    assert without_bands(BEFORE + bands + AFTER) == BEFORE + AFTER
    assert without_bands(AFTER + (bands if bands[0] == "[" else "")) == AFTER
    assert without_bands(BEFORE + AFTER) == BEFORE + AFTER


def test_bands_that_cannot_be_separated_are_not_cut() -> None:
    """A wrong cut would change the recipe."""
    with pytest.raises(RecipeError, match="write it as a table"):
        without_bands(f'[expect]\n{BAND_LINE}["a[b]"]\nc = 1\n')
