"""What a server of the smoke recipe's states needs: the folder that the recipe reads, and the verifier's states."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command import Spec
from fake_vllm import States

from speculators.verifier.engine import Engine


def smoke_verifier(spec: Spec) -> Engine:
    """Loads the verifier that a run of the recipe has made."""
    (folder,) = (spec.cache / "verifiers").glob("tiny-0-*[0-9]")
    return Engine(folder)


def folder_and_states(spec: Spec, engine: Engine) -> tuple[Path, States]:
    """Makes the folder that `spec serve-states smoke` names, and computes the layers that it asks a server for."""
    printed = spec("serve-states", "smoke", "--print", "--json").json
    layers = json.loads(printed["command"][printed["command"].index("--speculative-config") + 1])
    ids = layers["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    Path(printed["folder"]).mkdir(parents=True)

    def states(tokens: list[int]) -> torch.Tensor:
        return engine.capture_layers([torch.tensor(tokens)], ids)[0].view(len(tokens), len(ids), -1)

    return Path(printed["folder"]), states
