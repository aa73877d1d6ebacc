"""Runs the peer's side of train_loop: Trainer, data and defaults of vllm-project/speculators 0.9.0, on a CPU.

    PEER/bin/python benchmarks/perf/peer_loop.py FOLDER --steps 8              times a part of one epoch
    PEER/bin/python benchmarks/perf/peer_loop.py FOLDER --epochs 6 --save OUT  trains, and saves the draft model

benchmarks.perf.samples writes FOLDER; the algorithm is that of its recipe, in the shape that the recipe gives it
(SHARED). One that the peer only continues from a checkpoint (mtp) also needs `--start`. This script runs in the peer's
own environment and imports nothing of ours. The peer has our import name, so a type checker would take its modules for
ours: they are imported by name. Parts that cannot run on a CPU as shipped are overridden: flex attention (by sdpa) and
Triton losses (by eager ones) by its own options, the accelerator's index, its synchronisation and the autocast device
by hand. Everything else is its default, optimizer, rate, loss and position weights included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

# What the recipe gives both sides: the shape of the draft model and how many of its predictions are trained.
SHARED = ("ttt_steps", "num_layers", "block_size", "markov_rank", "num_depths", "max_anchors")
# The modules that shift a conversation's states against its tokens; other algorithms do it inside the model.
SHIFTS = {"eagle3": "eagle3.data.shift_batch", "peagle": "eagle3.data.shift_batch", "mtp": "mtp.data.shift_batch_mtp"}


class Transfer:
    """Gives the peer's data set the states of a sample, in the layout of its own cache files."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def setup(self) -> None:
        """Does nothing; the peer calls it."""

    def get_cached(self, file_idx: int) -> dict[str, torch.Tensor]:
        """Reads token_ids [n] and hidden_states [n, A + 1, H], the last layer's state after the others."""
        sample = load_file(self.files[file_idx])
        last = sample["last"]
        parts = sample["hidden_states"].view(len(last), -1, last.shape[1])  # [n, A, H]
        return {"token_ids": sample["input_ids"], "hidden_states": torch.cat([parts, last[:, None]], dim=1)}


class Clocked:
    """A loader that times each step, from the request for its batch to the request for the next one."""

    def __init__(self, loader: Any, lengths: list[int]) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler
        self.lengths = lengths
        self.steps: list[tuple[int, float]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches and records (tokens of the conversations, seconds) of each step."""
        members = list(self.batch_sampler)
        batches = iter(self.loader)
        for indices in members:
            started = time.perf_counter()
            yield next(batches)
            # The trainer asks for the next batch when its step is over.
            tokens = sum(self.lengths[int(index)] for index in indices)
            self.steps.append((tokens, time.perf_counter() - started))


class Losses(logging.Handler):
    """Collects the loss of each step from the trainer's log."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the loss, if the record has one."""
        if isinstance(record.msg, dict) and "train" in record.msg:
            self.values.append(record.msg["train"]["loss"])


def make_dataset(folder: Path, work: Path) -> tuple[list[Path], list[int]]:
    """Writes the peer's table of samples and returns their files and lengths."""
    files = sorted((folder / "samples").glob("*.safetensors"))
    columns: dict[str, list[Any]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    for file in files:
        sample = load_file(file)
        columns["input_ids"].append(sample["input_ids"].tolist())
        columns["loss_mask"].append(sample["loss_mask"].tolist())
        columns["seq_len"].append(len(sample["input_ids"]))
    table = datasets.Dataset.from_dict(columns)
    table.set_format(type="torch", columns=["input_ids", "loss_mask"], output_all_columns=True)
    table.save_to_disk(str(work))
    return files, columns["seq_len"]


def make_args(folder: Path, work: Path, options: argparse.Namespace) -> argparse.Namespace:
    """Resolves the settings by the peer's own code."""
    facts = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    shape = {name: value for name, value in facts["settings"].items() if name in SHARED}
    if options.start is not None:  # a checkpoint has its own depth, which the peer would refuse beside it
        shape = {"from_pretrained": str(options.start), **{name: shape[name] for name in shape if name != "num_layers"}}
    # Otherwise it loads the tokenizer to look for a mask token; ours takes the vocabulary's last, too.
    vocabulary = json.loads((Path(facts["verifier"]) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    chosen = {
        **shape,
        "verifier_name_or_path": facts["verifier"],
        "speculator_type": facts["algorithm"],
        "data_path": str(work / "data"),
        "save_path": str(work / "checkpoints"),
        "total_seq_len": facts["row_tokens"],
        "hidden_states_dtype": options.dtype,
        "draft_vocab_size": facts["draft_vocab_size"],
        "target_layer_ids": facts["layer_ids"],
        "loss_implementation": "eager",
        "mask_token_id": vocabulary - 1,
        "epochs": options.epochs or 1,
        # It writes a checkpoint after the first epoch in any case, then one at the end.
        "checkpoint_freq": float(max(1, options.epochs or 1)),
    }
    if options.start is None:  # a checkpoint has its own
        chosen["draft_attn_impl"] = "sdpa"
    config = importlib.import_module("speculators.train.config").TrainConfig.from_sources(cli=chosen, argv=sys.argv)
    return argparse.Namespace(**config.flatten())


def make_loader(args: argparse.Namespace, model: Any, files: list[Path], max_batches: int | None) -> Any:
    """Builds the peer's loader over all conversations: its data set, packing, collation and shift."""
    train: Any = importlib.import_module("speculators.train.dataloader")
    data = importlib.import_module("speculators.train.data").ArrowDataset(
        max_len=args.total_seq_len,
        datapath=args.data_path,
        transfer=Transfer(files),
        on_missing="raise",
        hidden_states_dtype=getattr(torch, args.hidden_states_dtype),
    )
    return train._setup_dataloader(
        data,
        args.total_seq_len,
        model.config.transformer_layer_config.hidden_size,
        num_workers=args.num_workers,
        num_target_layers=len(model.target_layer_ids),
        prefetch_factor=args.prefetch_factor,
        preprocess=shift(args.speculator_type),
        max_batches=max_batches,
        seed=args.seed,
    )


def shift(algorithm: str) -> Any:
    """Finds the peer's function that shifts a conversation; None where the model does it."""
    if algorithm not in SHIFTS:
        return None
    module, _, function = SHIFTS[algorithm].rpartition(".")
    return getattr(importlib.import_module(f"speculators.models.{module}"), function)


def make_trainer(args: argparse.Namespace, model: Any, loader: Any) -> Any:
    """Builds the peer's Trainer and overrides what would need an accelerator."""
    module: Any = importlib.import_module("speculators.train.trainer")
    module.get_local_rank = lambda: "cpu"
    torch.accelerator.synchronize = lambda *_, **__: None
    call_kwargs, _ = type(model).get_trainer_kwargs(**vars(args))
    names = [name for name in module.TrainerConfig._fields if hasattr(args, name)]
    config = module.TrainerConfig(
        **{
            **{name: getattr(args, name) for name in names},
            "num_epochs": args.epochs,
            "hidden_states_dtype": getattr(torch, args.hidden_states_dtype),
            "train_call_kwargs": call_kwargs,
            "val_call_kwargs": call_kwargs,
        }
    )
    trainer = module.Trainer(model, config, loader)
    trainer.device_type = "cpu"
    return trainer


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trains, saves the draft model if asked to, and returns the figures."""
    torch.set_num_threads(options.threads)
    files, lengths = make_dataset(options.folder, work / "data")
    args = make_args(options.folder, work, options)
    args.num_workers = options.workers
    cli = importlib.import_module("speculators.train.cli")
    cli.set_seed(args.seed)
    reduced = options.folder / "vocabulary.safetensors"
    maps = load_file(reduced) if reduced.exists() else {"t2d": None, "d2t": None}
    kind = importlib.import_module("speculators.model").SpeculatorModel.registry[args.speculator_type]
    model = cli.build_draft_model(args, kind, maps["t2d"], maps["d2t"], args.draft_vocab_size)
    if args.speculator_type == "mtp":
        args.num_speculative_steps = model.config.num_speculative_steps
    limit = None if options.epochs else options.warmup + options.steps
    loader = Clocked(make_loader(args, model, files, limit), lengths)
    losses = Losses()
    metrics = logging.getLogger("speculators.metrics")
    metrics.addHandler(losses)
    metrics.setLevel(logging.INFO)
    make_trainer(args, model, loader).run_training()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if options.save:
        model.save_pretrained(options.save)
    steps = loader.steps[options.warmup :]
    tokens, seconds = (sum(column) for column in zip(*steps, strict=True))
    return {
        "side": "peer",
        "algorithm": args.speculator_type,
        "draft_vocab": args.draft_vocab_size,
        "dtype": args.hidden_states_dtype,
        "optimizer": args.optimizer,
        "lr": args.lr,
        "muon_lr": args.muon_lr,
        "scheduler": args.scheduler_type,
        "loss": args.loss_fn,
        "row_tokens": args.total_seq_len,
        "rows_per_step": 1,
        "workers": args.num_workers,
        "epochs": args.epochs,
        "steps": len(steps),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "best_tokens_per_s": round(max(count / duration for count, duration in steps), 1),
        "all_seconds": round(sum(duration for _, duration in loader.steps), 1),
        "peak_rss_mb": peak,
        "loss_first": losses.values[0],
        "loss_last": losses.values[-1],
        "threads": options.threads,
        "loadavg": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=None, help="train N whole epochs instead")
    parser.add_argument("--save", default=None, help="folder for the trained draft model, in float32")
    parser.add_argument(
        "--start", type=Path, default=None, help="folder with the config.json that the draft starts from"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes of its data loader (0; its own default of 12 suits servers)"
    )
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="peer_loop_") as work:
        print("RESULT " + json.dumps(run(options, Path(work))), flush=True)


if __name__ == "__main__":
    main()
