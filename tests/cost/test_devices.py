"""What more nodes do to one update: figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.cost.costs import Amount, Costs, RowCost, VerifierCost
from speculators.cost.devices import Bandwidths, Device, simulate
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import make_plan

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama-3.1-8b" / "config.json"
# Half of 1 PFLOP/s each.
DEVICE, SHARE = Device(name="8xMade-up", count=8, peaks={"bf16": 1e15}), 0.5
BANDWIDTHS = Bandwidths(link=400e9, network=50e9, storage=20e9)


def costs(*overrides: str) -> Costs:
    """An update of 32 rows of 2048 tokens: 1 TFLOP a row, 800 MB trained, 80 MB of momentum, 10 kB of states a token.

    The verifier makes 2 MFLOP a token, its attention left out.
    """
    row = RowCost(
        trainable=200_000_000,
        frozen=0,
        trainable_bytes=800_000_000,
        frozen_bytes=0,
        head_bytes=0,
        optimizer_bytes=1_600_000_000,
        momentum_bytes=80_000_000,
        activation_bytes=0,
        chunk_bytes=0,
        row_flops=1_000_000_000_000,
        update_flops=500_000_000_000,
    )
    return Costs(
        plan=make_plan(load_recipe("eagle3_llama8b", overrides), VerifierFacts.read(LLAMA), world_size=8),
        row=row,
        verifier=VerifierCost(parameters=0, products=1_000_000, attention=0),
        amount=Amount(conversations=1, tokens=1, supervised=1.0, updates=1, trained=1, counted=True),
        mean_tokens=1024,
        state_bytes=10_000,
    )


def test_one_update_of_cached_states_at_one_node_and_at_64() -> None:
    """Compute and reading overlap, communication is added: on links within a node, on the network between nodes."""
    one, *_, many = simulate(costs('data.hidden_states="cached"'), DEVICE, 64, BANDWIDTHS, SHARE)
    # 4 rows each, and the optimizer's own: (4 x 1e12 + 0.5e12) / 0.5e15.
    assert (one["processes"], one["rows"], one["tokens_per_step"], one["grown"]) == (8, 4, 65_536, False)
    assert one["compute_seconds"] == pytest.approx(0.009)
    # Weights, gradients and momentum, 7 parts of 8 of each: 700 + 700 + 70 MB at 400 GB/s.
    assert one["communication_seconds"] == pytest.approx(0.003675)
    # 65,536 x 10 kB at 20 GB/s.
    assert one["reading_seconds"] == pytest.approx(0.032768)
    assert one["step_seconds"] == pytest.approx(0.032768 + 0.003675)
    assert one["tokens_per_second"] == pytest.approx(65_536 / 0.036443)
    # 512 processes for 32 rows: each gets one, so that the update is 16 times as large.
    assert (many["nodes"], many["processes"], many["rows"]) == (64, 512, 1)
    assert (many["tokens_per_step"], many["grown"]) == (1_048_576, True)
    assert many["compute_seconds"] == pytest.approx(0.003)
    # 511 parts of 512 of 1680 MB, now at 50 GB/s.
    assert many["communication_seconds"] == pytest.approx(1.67671875e9 / 50e9)
    # The storage is shared: 16 times as many tokens take 16 times as long.
    assert many["reading_seconds"] == pytest.approx(0.524288)
    assert many["step_seconds"] == pytest.approx(0.524288 + 0.033534375)


def test_online_nothing_is_read_and_the_verifier_computes() -> None:
    """4 rows of 2048 tokens of 2 MFLOP: 16.384 GFLOP more than the draft's own."""
    (one,) = simulate(costs(), DEVICE, 1, BANDWIDTHS, SHARE)
    assert one["reading_seconds"] == 0
    assert one["compute_seconds"] == pytest.approx((4.5e12 + 16.384e9) / 0.5e15)
    assert one["step_seconds"] == pytest.approx(one["compute_seconds"] + 0.003675)


def test_a_copy_in_each_process_moves_its_gradients_twice() -> None:
    """Unsharded: reduced and spread, 2 x 700 MB, and no weights."""
    (one,) = simulate(costs("distributed.shard=false"), DEVICE, 1, BANDWIDTHS, SHARE)
    assert one["communication_seconds"] == pytest.approx(1.4e9 / 400e9)
