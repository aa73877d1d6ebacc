"""One verifier over the processes of a launch (FSDP2): each keeps a part of every layer, and all run in step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts
from speculators.verifier.architecture import Skeleton, decoder_layers, trunk


def can_load_parts() -> bool:
    """Whether this transformers lets its caller choose the parts of a model that are sharded, as from 5.23 on."""
    return "fsdp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}


def check_can_load_parts() -> None:
    """Raises VerifierError unless `can_load_parts`."""
    if not can_load_parts():
        message = f"distributed.shard_verifier needs transformers 5.23 or newer, found {transformers.__version__}"
        raise VerifierError(message, hint="pip install 'transformers>=5.23,<6'")


def loaded_in_parts(facts: VerifierFacts, processes: int) -> dict[str, Any]:
    """Makes the arguments with which `from_pretrained` reads, on each process, only that process's part of the weights.

    A decoder layer is gathered for its forward and freed after it. The rest (embeddings, head, norms, an image tower)
    is gathered once and stays: so each forward of the trunk gathers the same, with and without the head.

    Raises:
        VerifierError: this transformers cannot load it so, or the architecture cannot be built.
    """
    check_can_load_parts()
    experts, _ = facts.experts()
    if experts and -(-experts // processes) * (processes - 1) >= experts:
        message = f"{facts.source}: its {experts} experts leave none for the last of {processes} processes"
        raise VerifierError(message, hint="transformers loads a part with experts only: launch fewer processes")
    model = Skeleton.of(facts).model
    names = {module: name for name, module in model.named_modules()}
    kept = (trunk(model), model.get_input_embeddings(), model.get_output_embeddings())
    plan = {f"{names[decoder_layers(model)]}.*": "free_full_weight"}
    # The root, "", is sharded by transformers itself.
    plan |= {names[module]: "keep_full_weight" for module in kept if module is not None and names[module]}
    return {"distributed_config": DistributedConfig(fsdp_size=processes, fsdp_plan=plan)}


class InStep:
    """Keeps processes in step, since a layer is gathered only where all of them run it.

    Before each forward, processes tell each other whether they have one to run. Those that have none left run an empty
    one while any other has.

    Args:
        model: loaded with `loaded_in_parts`, not yet run.
        group: exchanges values on the host.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup) -> None:
        self._trunk, self._group = trunk(model), group
        self._empty = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._following = False
        with torch.no_grad():
            # FSDP2 takes the first module that runs for its root, and that must be the whole model.
            model(input_ids=self._empty, use_cache=False)
        self._trunk.register_forward_pre_hook(self._announce)

    @torch.no_grad()
    def follow(self) -> None:
        """Takes part in the forwards of other processes until all of them follow."""
        self._following = True
        while self._any_works(working=False):
            self._trunk(input_ids=self._empty, use_cache=False)
        self._following = False

    def _announce(self, *_: Any) -> None:
        if not self._following:
            self._any_works(working=True)

    def _any_works(self, *, working: bool) -> bool:
        flag = torch.tensor(int(working))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
