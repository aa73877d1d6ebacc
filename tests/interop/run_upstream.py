"""Runs in upstream's environment: loads a speculator as upstream does, and runs its training forward on a batch.

    python run_upstream.py REQUEST.json ANSWER.json

REQUEST: `folder` (a speculator), `batch` (a safetensors file with what upstream's forward takes), `arguments` (of the
forward), `loss` (its name of a loss), `places` (what it would draw at random: anchors of blocks, or the elements of
P-EAGLE), `save` (where it writes the checkpoint again, None for nowhere), `logits` (a safetensors file to write).
ANSWER: `loss`, and the names of the checkpoint's tensors that upstream did not know or did not take as they are.

What upstream cannot do on a CPU as shipped is replaced by its own options: SDPA for flex attention, eager losses for
Triton's.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(folder: str) -> tuple[Any, dict[str, list[str]]]:
    """Loads the model in float32, and lists the tensors of its checkpoint that it lacks or changed."""
    base = importlib.import_module("speculators.config").SpeculatorModelConfig
    models = importlib.import_module("speculators.model").SpeculatorModel
    config = base.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "sdpa"
    model = models.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    loaded, saved = model.state_dict(), load_file(Path(folder) / "model.safetensors")
    common = saved.keys() & loaded.keys()
    changed = sorted(name for name in common if not torch.equal(saved[name], loaded[name].to(saved[name].dtype)))
    unknown = sorted(saved.keys() - common)
    return model, {"unknown": unknown, "changed": changed}


def watch(core: Any, captured: list[torch.Tensor]) -> None:
    """Records the logits from which the loss is computed."""
    compute = core.compute_metrics

    def watched(*args: Any, **options: Any) -> Any:
        captured.append((args[0] if args else options["logits"]).detach().clone())
        return compute(*args, **options)

    core.compute_metrics = watched


def place(core: Any, kind: str, places: dict[str, list[int]]) -> None:
    """Replaces upstream's random choices."""
    if kind == "peagle":
        pair = tuple(torch.tensor(places[name]) for name in ("anchors", "depths"))
        core.generate_cod_sample_indices = lambda **_: pair
    elif "anchors" in places:
        anchors = torch.tensor(places["anchors"])
        # The family shares one backbone, which calls this by its own module's name.
        shared = importlib.import_module("speculators.models.dflash.core")
        shared.select_anchors = lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool))


def main() -> None:
    """Answers the request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model, differences = load(request["folder"])
    kind = model.config.speculators_model_type
    core = importlib.import_module(f"speculators.models.{kind}.core")
    captured: list[torch.Tensor] = []
    watch(core, captured)
    place(core, kind, request["places"])
    losses = importlib.import_module("speculators.losses")
    # Its confidence head is judged by another loss, which it takes apart from the others.
    more = {"tv_loss_fn": losses.resolve_loss_config("tv", "eager")["tv"][0]} if kind == "dspark" else {}
    with torch.no_grad():
        _, loss, _ = model(
            **load_file(request["batch"]),
            loss_config=losses.resolve_loss_config(request["loss"], "eager"),
            **request["arguments"],
            **more,
        )
    save_file({str(depth): logits[0].contiguous() for depth, logits in enumerate(captured)}, request["logits"])
    if request["save"]:
        model.save_pretrained(request["save"])
    Path(sys.argv[2]).write_text(json.dumps({"loss": float(loss), **differences}), encoding="utf-8")


if __name__ == "__main__":
    main()
