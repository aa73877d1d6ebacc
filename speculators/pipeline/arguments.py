"""The one door of kwargs: a plan and its draft vocabulary become the arguments that every algorithm is built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from speculators.config import ProposalConfig, SpeculatorsConfig, VerifierConfig
from speculators.data.encoded import Conversations
from speculators.data.vocab import describe_vocabulary, draft_vocabulary
from speculators.init_from import start_vocabulary
from speculators.pipeline.context import Context
from speculators.recipe.plan import Plan
from speculators.verifier.tokens import folder_stop_ids

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}


def training_kwargs(plan: Plan, folder: str | None, vocabulary: torch.Tensor | None) -> dict[str, Any]:
    """Returns what `from_training_args` and `get_trainer_kwargs` receive.

    Args:
        plan: of the run.
        folder: of the verifier; None builds without its weights.
        vocabulary: [D] int64 sorted target ids; None for the whole vocabulary.
    """
    recipe, config = plan.recipe, plan.recipe.algorithm.config
    size = plan.facts.vocab_size
    t2d = d2t = None
    if vocabulary is not None:
        t2d = torch.zeros(size, dtype=torch.bool).index_fill_(0, vocabulary, True)
        d2t = vocabulary - torch.arange(len(vocabulary))
    return {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": folder,
        "target_layer_ids": plan.target_layer_ids,
        "draft_vocab_size": plan.draft_vocab_size,
        "transformer_layer_config": plan.transformer_layer_config,
        "speculators_config": speculators_config(plan, folder),
        "t2d": t2d,
        "d2t": d2t,
        "dtype": PRECISIONS[plan.precision],
        "seed": recipe.seed,
    }


def speculators_config(plan: Plan, folder: str | None) -> SpeculatorsConfig:
    """Returns the part of config.json that a server reads: how many tokens to draft, for which verifier."""
    verifier = plan.recipe.verifier
    name = verifier.model if verifier.kind == "hub" or folder is None else folder
    return SpeculatorsConfig(
        algorithm=plan.recipe.algorithm.name,
        proposal_methods=(ProposalConfig(speculative_tokens=plan.recipe.benchmark.num_speculative_tokens[0]),),
        verifier=VerifierConfig(name_or_path=name, architectures=tuple(plan.facts.architectures)),
    )


def vocabulary_of(context: Context, prepared: Conversations) -> tuple[torch.Tensor | None, str]:
    """Returns the draft vocabulary of the prepared data, [D] target ids, and what it covers in words."""
    ids, ends = draft_tokens(context, prepared)
    if ids is None:
        return None, f"the whole vocabulary of {context.plan.facts.vocab_size} tokens"
    return torch.from_numpy(ids), describe_vocabulary(ids, prepared.token_counts(), ends)


def draft_tokens(context: Context, prepared: Conversations) -> tuple[np.ndarray | None, set[int]]:
    """Returns the draft vocabulary, [D] target ids (None for all), and the ends of turns.

    It is that of the prepared data, or of the checkpoint that training starts from.
    """
    plan = context.plan
    # The ends of text, too: where the data ends every turn with another token, a draft must still be able to stop.
    trust = context.recipe.verifier.trust_remote_code
    ends = {*prepared.turn_ends, *folder_stop_ids(context.folder, trust_remote_code=trust)}
    ends = {token for token in ends if token < plan.facts.vocab_size}
    if plan.draft_vocab_size == plan.facts.vocab_size:
        return None, ends
    section = context.recipe.algorithm
    if section.config.init_from is not None:
        # A draft that goes on from another speaks its vocabulary: its head's rows are of these tokens.
        held = start_vocabulary(section.name, section.config.init_from, plan.draft_vocab_size)
        if held is not None:
            return held.numpy(), ends
    return draft_vocabulary(prepared.token_counts(), plan.draft_vocab_size, ends), ends
