"""What `spec plan` tells of costs: counts that can be checked by hand, bounds that say so, and wrong options."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Spec

from speculators.recipe.cluster import parse_devices

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama-3.1-8b" / "config.json"


@pytest.fixture(scope="module")
def llama_plan(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """EAGLE-3 for Llama-3.1-8B on eight GPUs and on sixteen, from its config.json alone."""
    spec = Spec(tmp_path_factory.mktemp("plan"))
    told = spec(
        *("plan", "eagle3_llama8b", "--verifier-config", LLAMA, "--gpus", "8xH100-80GB,16xH100"),
        *("--conversations", 1000, "--mean-tokens", 1024, "--simulate", "--nodes", 4, "--json"),
    )
    assert told.code == 0, told.err
    return told.json


def test_the_verifier_is_counted_from_its_config(llama_plan: dict) -> None:
    """8,030,261,248 parameters as published; a token meets all matrices of the 32 layers once."""
    verifier = llama_plan["costs"]["verifier"]
    assert verifier["parameters"] == 8_030_261_248
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14_336
    # Of grouped keys all 32 heads are multiplied: two products of 4096 a key and layer.
    assert verifier["products"] == 32 * layer
    assert verifier["attention"] == 4 * 4096 * 32


def test_twice_the_processes_hold_smaller_shards(llama_plan: dict) -> None:
    """Sharded optimizer state halves; activations of a row stay."""
    eight, sixteen = (device["memory"] for device in llama_plan["costs"]["devices"])
    assert sixteen["optimizer"] == pytest.approx(eight["optimizer"] / 2, rel=0.01)
    assert sixteen["activations"] == eight["activations"]


def test_bounds_of_unprepared_data_say_so(llama_plan: dict) -> None:
    """Two epochs of at most 1000 x 1024 tokens, in updates of 65,536."""
    data = llama_plan["costs"]["amount"]
    assert (data["tokens"], data["counted"]) == (1_024_000, False)
    assert data["updates"] == 2 * 16


def test_a_simulation_never_exceeds_linear_growth(llama_plan: dict) -> None:
    """Communication only adds: tokens a second and node fall from one node to two and four."""
    rates = [row["tokens_per_second"] / row["nodes"] for row in llama_plan["costs"]["simulation"]["rows"]]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "8xH1000"), "did you mean 'H100'"),
        (("--gpus", "0xH100"), "must be like 8xH100-80GB"),
        (("--simulate",), "goes with --gpus"),
        (("--efficiency", "2"), "above 0 and at most 1"),
        (("--gpus", "1xH100", "--bandwidths", "1,2"), "--simulate"),
    ],
)
def test_a_wrong_option_is_one_error(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """It names the option."""
    told = Spec(tmp_path)("plan", "eagle3_llama8b", "--verifier-config", LLAMA, *arguments)
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err


def test_a_device_has_its_usual_memory_unless_told() -> None:
    """In units of 1000."""
    usual, told = parse_devices("H100, 2xh100-94GB")
    assert (usual.count, usual.memory_bytes) == (1, 80e9)
    assert (told.count, told.memory_bytes) == (2, 94e9)
