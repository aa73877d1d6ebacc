"""The harnesses that compare with other projects run and report; tests do not judge what they measure."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = """
format = 1
name = "harness"
version = "1.0.0"
verifier = {{ model = "{verifier}", dtype = "float32" }}
data = {{ sources = [{{ path = "{rows}" }}], max_tokens = 64, hidden_states = "cached" }}
algorithm = {{ name = "eagle3", draft_vocab_size = 64 }}
schedule = {{ tokens_per_step = 64, optimizer = {{ name = "muon", lr = 1e-3 }} }}
"""


@pytest.fixture
def perf(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/perf, which the installed package does not contain."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.perf.{name}")


def test_our_loop_trains_on_exported_samples_and_the_export_holds_every_conversation(
    perf, tmp_path, cache, tiny_verifier
):
    """`samples` writes tokens, mask and states of each conversation; `train_loop` then reports tokens per second."""
    rows = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": f"It is {k}."}] for k in range(6)]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    recipe, folder = tmp_path / "harness.toml", tmp_path / "samples"
    recipe.write_text(RECIPE.format(verifier=tiny_verifier, rows=rows), encoding="utf-8")
    facts = perf("samples").export(str(recipe), [], folder)
    samples = [load_file(file) for file in sorted((folder / "samples").iterdir())]
    assert len(samples) == facts["conversations"] == 6
    assert sum(len(sample["input_ids"]) for sample in samples) == facts["tokens"]
    assert sum(int(sample["loss_mask"].sum()) for sample in samples) == facts["supervised"]
    assert all(sample["hidden_states"].shape == (len(sample["last"]), 3 * 32) for sample in samples)
    options = argparse.Namespace(steps=2, warmup=1, threads=torch.get_num_threads())
    result = perf("train_loop").measure(folder, options)
    assert result["steps"] == 2
    assert 0 < result["tokens"] <= 2 * 64


def test_the_arithmetic_of_a_step_matches_a_count_by_hand(perf):
    """A step takes about 340 GFLOP at D = 8192 (S = 2048, three depths); each further token adds seven head rows."""
    step_gflop = perf("train_step").step_gflop
    assert step_gflop(2048, 8192, 3) == pytest.approx(340, rel=0.02)
    more = step_gflop(2048, 8193, 3) - step_gflop(2048, 8192, 3)
    assert more == pytest.approx(7 * 2 * 2048 * 576 / 1e9)


def test_sides_are_compared_by_their_medians_in_the_direction_that_is_better(perf):
    """The ratio is ours over theirs for speed and theirs over ours for memory: above 1, ours is better at both."""
    side_by_side = perf("side_by_side")
    columns = (
        side_by_side.Column(key="speed", title="tokens/s"),
        side_by_side.Column(key="memory", title="MB", higher_is_better=False),
    )
    ours = [{"speed": speed, "memory": 100} for speed in (1, 40, 1000)]
    theirs = [{"speed": 10, "memory": 250}] * 3
    last = side_by_side.table({"cell": {"ours": ours, "peer": theirs}}, columns).splitlines()[-1]
    assert last == "| cell | 40 | 10 | 4.00 | 100 | 250 | 2.50 |"


def test_a_side_that_fails_stops_the_comparison_with_its_message(perf):
    """A side that crashes raises its own message instead of leaving a number out."""
    side_by_side = perf("side_by_side")
    broken = side_by_side.Side("peer", (sys.executable, "-c", "raise SystemExit('no accelerator')"))
    with pytest.raises(RuntimeError, match="no accelerator"):
        side_by_side.run(broken, threads=1)
