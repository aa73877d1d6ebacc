"""The one door of kwargs: a plan and its draft vocabulary become the arguments that every algorithm is built from."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch

from speculators.config import ProposalConfig, SpeculatorsConfig, VerifierConfig
from speculators.data.encoded import Conversations
from speculators.data.vocab import coverage, draft_vocabulary, rare_tokens
from speculators.init_from import start_vocabulary
from speculators.pipeline.context import Context
from speculators.recipe.plan import Plan
from speculators.verifier.tokens import folder_stop_ids

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}


def training_kwargs(plan: Plan, folder: str | None, vocabulary: torch.Tensor | None) -> dict[str, Any]:
    """Builds the arguments of `from_training_args` and `get_trainer_kwargs`.

    Args:
        plan: of the run.
        folder: of the verifier; None builds without its weights.
        vocabulary: [D] int64 sorted target ids; None for the whole vocabulary.
    """
    recipe, config = plan.recipe, plan.recipe.algorithm.config
    t2d = d2t = None
    if vocabulary is not None:
        t2d = torch.zeros(plan.facts.vocab_size, dtype=torch.bool).index_fill_(0, vocabulary, True)  # [V]
        d2t = vocabulary - torch.arange(len(vocabulary))  # [D], offsets as servers expect them
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


def stand_in_vocabulary(plan: Plan) -> torch.Tensor | None:
    """Makes a draft vocabulary of the right size, [D], for models that are built before there is data."""
    return torch.arange(plan.draft_vocab_size) if plan.draft_vocab_size < plan.facts.vocab_size else None


def speculators_config(plan: Plan, folder: str | None) -> SpeculatorsConfig:
    """Builds the part of config.json that a server reads: how many tokens to draft, for which verifier."""
    verifier = plan.recipe.verifier
    name = verifier.model if verifier.kind == "hub" or folder is None else folder
    return SpeculatorsConfig(
        algorithm=plan.recipe.algorithm.name,
        proposal_methods=(ProposalConfig(speculative_tokens=plan.recipe.benchmark.num_speculative_tokens[0]),),
        verifier=VerifierConfig(name_or_path=name, architectures=tuple(plan.facts.get("architectures") or ())),
    )


@attrs.frozen(kw_only=True)
class DraftVocabulary:
    """The tokens that a speculator drafts.

    Attributes:
        ids: [D] int64 sorted target ids; None for all.
        ends: tokens that end a turn or a text, which must be among them.
        coverage: share of the supervised tokens that can be drafted.
        rare_ends: the ends that are too rare to be among them by frequency.
    """

    ids: np.ndarray | None
    ends: frozenset[int]
    coverage: float = 1.0
    rare_ends: tuple[int, ...] = ()

    @property
    def tensor(self) -> torch.Tensor | None:
        """The ids as a tensor, [D] int64."""
        return None if self.ids is None else torch.from_numpy(self.ids)

    @classmethod
    def of(cls, context: Context, prepared: Conversations) -> DraftVocabulary:
        """Takes the most frequent tokens of the prepared data, or those of the checkpoint that training starts from."""
        plan, size = context.plan, context.plan.draft_vocab_size
        # The ends of text, too: where the data ends every turn with another token, a draft must still be able to stop.
        ends = {*prepared.turn_ends, *folder_stop_ids(context.folder, context.recipe.verifier)}
        ends = {token for token in ends if token < plan.facts.vocab_size}
        if size == plan.facts.vocab_size:
            return cls(ids=None, ends=frozenset(ends))
        section, inherited, counts = context.recipe.algorithm, None, prepared.token_counts()
        if section.config.init_from is not None:
            # A draft that goes on from another keeps its vocabulary: the rows of its head are these tokens.
            inherited = start_vocabulary(section.name, section.config.init_from, size)
        ids = draft_vocabulary(counts, size, ends) if inherited is None else inherited.numpy()
        rare = rare_tokens(ids, counts, ends)
        return cls(ids=ids, ends=frozenset(ends), coverage=coverage(ids, counts), rare_ends=rare)
