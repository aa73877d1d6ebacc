"""Writes a recipe's conversations, hidden states and loss masks to a folder that the peer's training loop reads.

    python -m benchmarks.perf.samples RECIPE FOLDER [--set section.key=value ...]

Runs the recipe's stages verifier, prepare and capture, or finds them done, and writes:

    samples/00000.safetensors  one conversation: input_ids [n] int64, loss_mask [n] bool (the token belongs to an
                               answer), hidden_states [n, A*H], last [n, H], in the recipe's data.states_dtype
    vocabulary.safetensors     t2d [V] bool, d2t [D] int64 (offsets)
    samples.json               verifier folder, layer ids, row length, algorithm and its settings; written last
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from speculators.data.batches import StateSource
from speculators.data.encoded import Conversations
from speculators.events import ignore
from speculators.pipeline.arguments import DraftVocabulary, training_kwargs
from speculators.pipeline.capture import state_source
from speculators.pipeline.context import Context
from speculators.pipeline.prepare import prepared_conversations
from speculators.pipeline.setup import make_context
from speculators.recipe.load import load_recipe
from speculators.runs.places import Places
from speculators.training.world import World

FACTS = "samples.json"


@attrs.frozen(eq=False)
class RowInputs:
    """The inputs of training, as `spec run` prepares them.

    Attributes:
        kwargs: the arguments that the model is built from.
    """

    context: Context
    prepared: Conversations
    source: StateSource
    kwargs: dict[str, Any]


def stages(recipe: str, overrides: list[str], places: Places) -> RowInputs:
    """Runs the stages before training, skipping those that are done."""
    context = make_context(load_recipe(recipe, overrides), places, World(), ignore)
    prepared = prepared_conversations(context)
    source = state_source(context, prepared)
    context.free_engine()
    vocabulary = DraftVocabulary.of(context, prepared).tensor
    return RowInputs(context, prepared, source, training_kwargs(context.plan, str(context.folder), vocabulary))


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads `samples.json`; raises SystemExit with the command that writes it if it is missing."""
    if not (folder / FACTS).is_file():
        raise SystemExit(f"{folder} has no {FACTS}: python -m benchmarks.perf.samples RECIPE {folder}")
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def export(recipe: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Writes the folder and returns the contents of `samples.json`."""
    inputs = stages(recipe, overrides, Places())
    plan, prepared = inputs.context.plan, inputs.prepared
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for index in range(len(prepared)):
        encoded = prepared.row(index)
        ((hidden_states, last),) = inputs.source.states([index])
        tensors = {
            "input_ids": torch.from_numpy(encoded.input_ids).long(),
            "loss_mask": torch.from_numpy(encoded.loss_mask.copy()),
            "hidden_states": hidden_states.contiguous(),
            "last": last.contiguous(),
        }
        save_file(tensors, folder / "samples" / f"{index:05d}.safetensors")
    if inputs.kwargs["d2t"] is not None:
        save_file({name: inputs.kwargs[name] for name in ("t2d", "d2t")}, folder / "vocabulary.safetensors")
    facts = {
        "recipe": recipe,
        "overrides": overrides,
        "verifier": str(inputs.context.folder.resolve()),
        "layer_ids": list(plan.target_layer_ids),
        "row_tokens": plan.row_tokens,
        "rows_per_step": plan.rows_per_step,
        "algorithm": inputs.context.recipe.algorithm.name,
        "settings": {name: value for name, value in inputs.kwargs.items() if type(value) in (int, float, bool)},
        "draft_vocab_size": plan.draft_vocab_size,
        "data": prepared.fingerprint,
        "conversations": len(prepared),
        "tokens": int(prepared.lengths.sum()),
        "supervised": int(prepared.supervised.sum()),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a shipped recipe, or a TOML file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(json.dumps(export(options.recipe, options.overrides, options.folder), indent=2))


if __name__ == "__main__":
    main()
