"""Compares training's forward with replay on the verifier's answers: the same drafts must be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from speculators.bench.rows import Response
from speculators.contract import build_model, trainer_kwargs
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.doctor.answers import Answers
from speculators.doctor.check import Check, Family
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.model import SpeculatorModel

PARITY = Family("parity")
NAME = "training's forward"
# If the two likeliest tokens are this close, relative to the largest logit, rounding may swap them.
NEAR_TIE = 1e-4
# Relative difference that reordering the same sum can cause in the loss.
SAME_LOSS = 1e-5
# Tokens of a row: block drafters then use every anchor instead of drawing a sample.
LONGEST = 500


def trained_forward(speculator: ExaminedSpeculator, responses: Sequence[Response], answers: Answers) -> Check:
    """Compares the accuracy by depth that training reports on each answer with that of replay's drafts."""
    model, kwargs = training_model(speculator)
    if type(model).align is not SpeculatorModel.align:
        return PARITY.skipped(NAME, "the algorithm shifts its samples (align), so replay reads other rows")
    places, worst, pairs, drawn = 0, 0.0, "", False
    for response in responses:
        row, mask = _row(speculator, model, response, answers)
        (first, loss), (_, again) = (_accuracies(model, row, kwargs, seed) for seed in (0, 1))
        if not first:
            return PARITY.skipped(NAME, "the forward reports no accuracy by depth (accuracy_1, accuracy_2, ...)")
        # Some algorithms train randomly drawn depths, apart from the first. The loss then differs between two calls;
        # accuracies do not show it reliably, because those of a poor draft are both 0.
        same = math.isclose(loss, again, rel_tol=SAME_LOSS)
        depths = [depth for depth in first if depth == 1 or same]
        drawn = drawn or not same
        replayed = _replayed(model, row, mask, max(depths))
        gaps = {
            depth: abs(first[depth] - replayed[depth][0]) - replayed[depth][1] for depth in depths if depth in replayed
        }
        places += int(mask.sum())
        if not pairs or max(gaps.values()) > worst:
            pairs = ", ".join(f"{first[depth]:.4f} and {replayed[depth][0]:.4f}" for depth in gaps)
        worst = max(worst, *gaps.values())
    figures = f"accuracy by depth of training and of replay on {places} places of {len(responses)} answers: {pairs}"
    figures += " in the answer that differs most" if len(responses) > 1 else ""
    figures += "; deeper ones are drawn at random" if drawn else ""
    if worst <= 1e-6:
        return PARITY.ok(NAME, figures)
    todo = "training and drafting disagree: fix the algorithm's forward or its replay"
    return PARITY.wrong(NAME, f"training's forward drafts different tokens from replay: {figures}", todo)


def _row(
    speculator: ExaminedSpeculator, model: SpeculatorModel, response: Response, answers: Answers
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Builds a training row from an answer, and the mask [S] bool of the places to compare."""
    tokens = torch.tensor(response.tokens[:LONGEST])
    chosen, last = answers.engine.capture([tokens], model.draft().target_layer_ids)[0]
    # Training replaces a token outside the draft vocabulary by the likeliest one inside it; leave such places out.
    greedy = torch.cat((tokens[:1], answers.head.logits(last[:-1].to(answers.head.weight.dtype)).argmax(-1).cpu()))
    known = torch.isin(tokens, model.draft_to_target.cpu()) & (greedy == tokens)
    mask = known & (torch.arange(len(tokens)) >= response.prompt_length)
    item = (Encoded(tokens.int().numpy(), mask.numpy()), (chosen.float().cpu(), last.float().cpu()))
    row = build_row([item], widths=(chosen.shape[1], last.shape[1]), dtype=torch.float32, align=model.align)
    return {key: tensor.to(speculator.device) for key, tensor in row.items()}, mask


def training_model(speculator: ExaminedSpeculator) -> tuple[SpeculatorModel, dict[str, Any]]:
    """Builds the model as training does, in float32, with the extra arguments of its forward.

    Raises:
        SpeculatorsError: the checkpoint does not suffice to build the algorithm for training.
    """
    model, config = speculator.model, speculator.config
    assert model is not None
    assert config is not None
    size = int(speculator.facts["vocab_size"])
    ids = model.draft_to_target.cpu()
    reduced = len(ids) < size
    kwargs = {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": str(speculator.verifier),
        "target_layer_ids": speculator.layer_ids,
        "draft_vocab_size": len(ids),
        "num_layers": speculator.decoder["num_hidden_layers"],
        "transformer_layer_config": speculator.decoder,
        "speculators_config": config.speculators_config,
        "t2d": torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True) if reduced else None,
        "d2t": ids - torch.arange(len(ids)) if reduced else None,
        "dtype": "float32",
        "seed": 0,
    }
    built = build_model(config.speculators_model_type, speculator.facts, kwargs)
    _, forward = trainer_kwargs(built, kwargs)
    built.float().load_state_dict(model.state_dict(), strict=False)
    return built.to(speculator.device).eval(), forward


@torch.no_grad()
def _accuracies(
    model: SpeculatorModel, row: dict[str, torch.Tensor], kwargs: dict[str, Any], seed: int
) -> tuple[dict[int, float], float]:
    """Runs the forward: accuracy_k by k (the share of rows whose drafts up to k are all right), and the loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, loss, metrics = model(**row, **kwargs)
    named = {key.removeprefix("accuracy_"): value for key, value in metrics.items() if key.startswith("accuracy_")}
    return {int(depth): float(value) for depth, value in sorted(named.items()) if depth.isdecimal()}, float(loss)


def _replayed(
    model: SpeculatorModel, row: dict[str, torch.Tensor], mask: torch.Tensor, depths: int
) -> dict[int, tuple[float, float]]:
    """Computes the same from replay: by depth, the accuracy and the share of rows with a near tie."""
    tokens, size = row["input_ids"][0].cpu(), len(mask)
    names = ("hidden_states", "input_ids", "position_ids", "document_ids")
    rows = torch.arange(size)
    right = complete = torch.ones(size, dtype=torch.bool)
    tied = torch.zeros(size, dtype=torch.bool)
    by_depth = {}
    replayed = model.replay(**{name: row[name] for name in names}, num_speculative_tokens=depths)
    for depth, logits in enumerate(replayed, start=1):
        place = rows + 1 + depth  # row r drafts place r + 1 + depth
        there = place < size
        supervised = torch.zeros(size, dtype=torch.bool)
        supervised[there] = mask[place[there]]
        best = logits.float().cpu().topk(min(2, logits.shape[1]), dim=-1)
        hit = model.draft_to_target.cpu()[best.indices[:, 0]] == tokens[place.clamp_max(size - 1)]
        complete, right = complete & supervised, right & hit & supervised
        margin = best.values[:, 0] - best.values[:, -1]
        tied = tied | (supervised & (margin <= NEAR_TIE * best.values[:, 0].abs()))
        count = max(1, int(complete.sum()))
        by_depth[depth] = (float(right.sum()) / count, float((tied & complete).sum()) / count)
    return by_depth
