"""Times one training step of the SmolLM2-135M shape: ours, or ours and the peer's in turn.

    python -m benchmarks.perf.train_step [--algo eagle3] [--draft-vocab 8192] [--dtype bfloat16] [--profile]
    python -m benchmarks.perf.train_step --peer PEER/bin/python --peer-script peer_train_step.py [--rounds 3]

The batch is one document of `--seq-len` tokens with random states, all supervised. A step is forward, backward,
clipping and optimizer, through the update of the real training loop. The verifier is a folder of random weights, read
like any other. benchmarks/README.md defines the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from benchmarks.perf.side_by_side import Column, Side, interleave, report, table
from speculators.config import SpeculatorModelConfig
from speculators.contract import build_model, trainer_kwargs
from speculators.facts import VerifierFacts
from speculators.model import SpeculatorModel
from speculators.nn.layout import RowLayout
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.schema import LearningRate, OptimizerSection, ScheduleSection
from speculators.training.optimizer import Optimizer
from speculators.training.state import Batch, BatchRow, Job
from speculators.training.stop import StopRequest
from speculators.training.update import Worker, update
from speculators.training.world import World, keep_freed_memory

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@attrs.frozen
class Cell:
    """One line of the comparison.

    Attributes:
        algo: the registered name, which is the same on both sides.
        settings: fields of our config that differ from its defaults.
        peer: the same settings as options of the peer's script.
    """

    algo: str
    dtype: str
    draft_vocab: int
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    peer: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = "".join(f", {name} {value}" for name, value in self.settings.items())
        return f"{self.algo}, {self.dtype}, D = {self.draft_vocab}{settings}"


ANCHORS = ("--max-anchors", "128")
CELLS = (
    Cell("eagle3", "float32", 8192),
    Cell("eagle3", "bfloat16", 8192),
    Cell("eagle3", "bfloat16", 32000),
    Cell("peagle", "bfloat16", 8192, peer=("--num-depths", "8", "--max-anchors", "512")),
    Cell("dflash", "bfloat16", 8192, {"max_anchors": 128}, ("--num-layers", "5", "--block-size", "16", *ANCHORS)),
    Cell("dflash", "bfloat16", 8192, peer=("--num-layers", "5", "--block-size", "16", "--max-anchors", "512")),
    Cell("dspark", "bfloat16", 8192, {"max_anchors": 128}, ("--block-size", "8", *ANCHORS)),
    Cell("mtp", "bfloat16", 49152),
)
COLUMNS = (
    Column(key="tokens_per_s", title="tokens/s (mean)"),
    Column(key="best_tokens_per_s", title="tokens/s (best)"),
    Column(key="cpu_s_per_step", title="CPU s per step", higher_is_better=False, digits=2),
    Column(key="peak_rss_mb", title="peak RSS MB", higher_is_better=False),
)


def make_verifier(folder: Path) -> Path:
    """Writes the only tensors of a verifier that training reads: embeddings (the tied head) and final norm, in bf16."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.empty(SHAPE["vocab_size"], SHAPE["hidden_size"], dtype=torch.bfloat16)
    embeddings.normal_(std=0.02, generator=generator)
    norm = torch.ones(SHAPE["hidden_size"], dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    save_file({"model.embed_tokens.weight": embeddings, "model.norm.weight": norm}, folder / "model.safetensors")
    return folder


def build(folder: Path, options: argparse.Namespace) -> tuple[SpeculatorModel, dict[str, Any]]:
    """Builds the model as a recipe would; also returns the kwargs that it was built from."""
    draft_vocab = options.draft_vocab
    facts = VerifierFacts.read(folder / "config.json")
    config = SpeculatorModelConfig.get_class(options.algo)(**json.loads(options.settings))
    ids = torch.randperm(facts.vocab_size)[:draft_vocab].sort().values
    reduced = draft_vocab < facts.vocab_size
    kwargs = {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": str(folder),
        "target_layer_ids": config.layer_ids(facts.num_hidden_layers),
        "transformer_layer_config": draft_decoder_config(facts, config),
        "draft_vocab_size": draft_vocab,
        "t2d": torch.zeros(facts.vocab_size, dtype=torch.bool).index_fill(0, ids, True) if reduced else None,
        "d2t": ids - torch.arange(draft_vocab) if reduced else None,
        "dtype": options.dtype,
    }
    model = build_model(options.algo, facts, kwargs)
    return model, kwargs


def make_batch(length: int, dtype: torch.dtype, states: int) -> Batch:
    """Makes a batch of one row: one document of random tokens with `states` states per token, all supervised."""
    generator = torch.Generator().manual_seed(1)
    width, size = SHAPE["hidden_size"], SHAPE["vocab_size"]
    tensors = {
        "hidden_states": torch.randn(1, length, states * width, generator=generator).to(dtype),
        "verifier_last_hidden_states": torch.randn(1, length, width, generator=generator).to(dtype),
        "input_ids": torch.randint(size, (1, length), generator=generator),
        "loss_mask": torch.ones(1, length, dtype=torch.bool),
        "position_ids": torch.arange(length)[None],
        "document_ids": torch.zeros(1, length, dtype=torch.int64),
    }
    layout = RowLayout.of(tensors["document_ids"], tensors["loss_mask"])
    row = BatchRow(tensors=tensors, supervised=length, index=0, layout=layout)
    return Batch(epoch=0, rows=(row,), num_rows=1, tokens=length, supervised=length)


def step_gflop(length: int, draft_vocab: int, depths: int) -> float:
    """Counts the multiplications and additions that a step cannot avoid, in 10^9.

    Backward counts twice the forward, the frozen head once (no weight gradient), `fc` once (no input gradient), the
    causal attention half of S x S, the targets once. Own-position keys, norms and softmaxes are left out.
    """
    h, inner, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = heads * SHAPE["num_attention_heads"], heads * SHAPE["num_key_value_heads"]
    layer = 2 * h * (queries + 2 * keys) + queries * h + 3 * h * inner
    attention = length * queries
    head = h * draft_vocab
    each_depth = 3 * (layer + attention) + 2 * head
    return float(2 * length * (depths * each_depth + head + 2 * (3 * h * h)) / 1e9)


def matmul_gflops(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Measures this machine's rate at a square product, in 10^9 operations per second; the best repeat counts."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times our step and returns the figures of the table in benchmarks/README.md."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(prefix="train_step_") as temporary:
        model, kwargs = build(make_verifier(Path(temporary)), options)
        schedule = ScheduleSection(
            optimizer=OptimizerSection(name=options.optimizer, lr=1e-4, clip_norm=1.0),
            learning_rate=LearningRate(shape="constant", warmup=0.0),
            precision={"float32": "fp32", "bfloat16": "bf16"}[options.dtype],
        )
        total = options.warmup + options.steps
        job = Job(schedule=schedule, total_steps=total, seed=0, folder=Path(temporary), fingerprint="")
        worker = Worker(
            model=model,
            optimizer=Optimizer(model, schedule.optimizer, ema=schedule.ema),
            job=job,
            world=World(),
            train_kwargs=trainer_kwargs(model, kwargs)[0],
        )
        model.train()
        batch = make_batch(options.seq_len, dtype, len(kwargs["target_layer_ids"]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        losses = _steps(worker, batch, 0, options.warmup)[1]
        cpu = time.process_time()
        measured, later = _steps(worker, batch, options.warmup, total)
        cpu = time.process_time() - cpu
        if options.profile:
            _profile(worker, batch)
    mean = sum(measured) / len(measured)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "side": "ours",
        "algo": options.algo,
        "settings": json.loads(options.settings),
        "draft_vocab": options.draft_vocab,
        "dtype": options.dtype,
        "optimizer": options.optimizer,
        "seq_len": options.seq_len,
        "threads": options.threads,
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_s": round(mean, 3),
        "tokens_per_s": round(options.seq_len / mean, 1),
        "cpu_s_per_step": round(cpu / len(measured), 3),
        "best_step_s": round(min(measured), 3),
        "best_tokens_per_s": round(options.seq_len / min(measured), 1),
        "rss_before_mb": before,
        "peak_rss_mb": peak,
        **floor(options, model, dtype, min(measured)),
        "loss_first": (losses + later)[0],
        "loss_last": later[-1],
        "loadavg": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def floor(options: argparse.Namespace, model: SpeculatorModel, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Compares a step with its arithmetic floor; empty for algorithms whose arithmetic `step_gflop` does not count."""
    if options.algo != "eagle3":
        return {}
    # Called after the peak memory was read: the matrices of this product do not belong to a step.
    rate, gflop = matmul_gflops(dtype), step_gflop(options.seq_len, options.draft_vocab, model.config.ttt_steps)
    return {
        "gflop": round(gflop, 1),
        "matmul_gflops": round(rate, 1),
        "floor_fraction": round(gflop / rate / seconds, 3),
    }


def _steps(worker: Worker, batch: Batch, first: int, stop: int) -> tuple[list[float], list[float]]:
    """Makes the updates `first` to `stop` and returns the seconds and the loss of each."""
    times, losses = [], []
    # Not entered as a context: Ctrl-C should end a benchmark at once, not after the update.
    request = StopRequest()
    for step in range(first, stop):
        started = time.perf_counter()
        outcome = update(worker, batch, step=step, request=request)
        times.append(time.perf_counter() - started)
        losses.append(outcome.metrics["loss"])
    return times, losses


def _profile(worker: Worker, batch: Batch) -> None:
    with torch.profiler.profile() as profiler:
        _steps(worker, batch, 0, 1)
    rows = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
    print(rows, file=sys.stderr)


def sides(cell: Cell, options: argparse.Namespace) -> tuple[Side, Side]:
    """Builds the command lines of both programs for one cell."""
    shared = ["--algo", cell.algo, "--draft-vocab", cell.draft_vocab, "--dtype", cell.dtype]
    shared += ["--optimizer", options.optimizer, "--seq-len", options.seq_len, "--threads", options.threads]
    shared += ["--steps", options.steps, "--warmup", options.warmup]
    own = ("--settings", json.dumps(dict(cell.settings)))
    ours = (sys.executable, "-m", "benchmarks.perf.train_step", *map(str, shared), *own)
    theirs = (options.peer, options.peer_script, "--attn", "sdpa", *map(str, shared), *cell.peer)
    return Side("ours", ours), Side("peer", theirs)


def compare(options: argparse.Namespace) -> None:
    """Runs both sides in every cell and prints the table."""
    results = {}
    for cell in (CELLS[number] for number in options.cells):
        print(cell, file=sys.stderr, flush=True)
        results[str(cell)] = interleave(sides(cell, options), rounds=options.rounds, threads=options.threads)
    print(f"S = {options.seq_len}, {options.optimizer}, {options.threads} threads,")
    print(f"medians of {options.rounds} processes per side, in turn, {options.steps} steps each\n")
    print(table(results, COLUMNS))
    report(results)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="eagle3")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--settings", default="{}", help="fields of the algorithm's config, as JSON")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where one more step spends its time")
    parser.add_argument("--peer", help="the peer's Python: run both sides in turn, in all cells")
    parser.add_argument("--peer-script", help="the peer's side (peer_train_step.py)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side in each cell")
    numbers = range(len(CELLS))
    cells = "; ".join(f"{number}: {cell}" for number, cell in enumerate(CELLS))
    parser.add_argument("--cells", type=int, nargs="+", choices=numbers, default=list(numbers), help=cells)
    options = parser.parse_args()
    if options.peer is None:
        report(measure(options))
    elif options.peer_script is None:
        parser.error("--peer needs --peer-script")
    else:
        compare(options)


if __name__ == "__main__":
    main()
