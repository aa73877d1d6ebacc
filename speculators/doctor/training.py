"""The forward of training on answers of the verifier's own, held against replay: the same drafts are right."""

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
from speculators.doctor.subject import Patient
from speculators.model import SpeculatorModel

PARITY = Family("parity")
NAME = "training's forward"
# A draft whose two likeliest tokens are so near, relative to the largest logit, may be another one by rounding.
NEAR_TIE = 1e-4
# Of the loss: the same places in another order are added up so much apart at most.
SAME_LOSS = 1e-5
# Block drafters draw so many anchors of a row at most; in a shorter one all are drawn.
LONGEST = 500


def trained_forward(patient: Patient, responses: Sequence[Response], answers: Answers) -> Check:
    """Compares the accuracy by depth that training reports on each answer with what replay's drafts come to."""
    model, kwargs = training_model(patient)
    if type(model).align is not SpeculatorModel.align:
        return PARITY.skipped(NAME, "the algorithm shifts its samples (align): rows are not those that replay reads")
    places, worst, told, drawn = 0, 0.0, "", False
    for response in responses:
        row, mask = _row(patient, model, response, answers)
        (first, loss), (_, again) = (_accuracies(model, row, kwargs, seed) for seed in (0, 1))
        if not first:
            return PARITY.skipped(NAME, "it reports no accuracy by depth (metrics accuracy_1, accuracy_2, ...)")
        # What is drawn at random differs from one call to the next, but for the first depth, which every row has. The
        # loss shows it; accuracies of a poor draft are equal by chance, 0 and 0.
        same = math.isclose(loss, again, rel_tol=SAME_LOSS)
        depths = [depth for depth in first if depth == 1 or same]
        drawn = drawn or not same
        wanted = _replayed(model, row, mask, max(depths))
        gaps = {depth: abs(first[depth] - wanted[depth][0]) - wanted[depth][1] for depth in depths if depth in wanted}
        places += int(mask.sum())
        if not told or max(gaps.values()) > worst:
            told = ", ".join(f"{first[depth]:.4f} and {wanted[depth][0]:.4f}" for depth in gaps)
        worst = max(worst, *gaps.values())
    told = f"accuracy by depth of training and of replay on {places} places of {len(responses)} answers: {told}"
    told += " in the one that differs most" if len(responses) > 1 else ""
    told += "; deeper ones are drawn at random" if drawn else ""
    if worst <= 1e-6:
        return PARITY.ok(NAME, told)
    todo = "what was trained is not what is drafted: mend the algorithm's forward or its replay"
    return PARITY.wrong(NAME, f"training's forward drafts other tokens than replay: {told}", todo)


def _row(
    patient: Patient, model: SpeculatorModel, response: Response, answers: Answers
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns an answer as a row of training, and [S] bool, its places that are compared."""
    tokens = torch.tensor(response.tokens[:LONGEST])
    chosen, last = answers.engine.capture([tokens], model.draft().target_layer_ids)[0]
    # A token that the draft cannot say is compared with the likeliest one that it can: left out, as is the prompt.
    said = torch.cat((tokens[:1], answers.head.logits(last[:-1].to(answers.head.weight.dtype)).argmax(-1).cpu()))
    known = torch.isin(tokens, model.draft_to_target.cpu()) & (said == tokens)
    mask = known & (torch.arange(len(tokens)) >= response.prompt_length)
    item = (Encoded(tokens.int().numpy(), mask.numpy()), (chosen.float().cpu(), last.float().cpu()))
    row = build_row([item], widths=(chosen.shape[1], last.shape[1]), dtype=torch.float32, align=model.align)
    return {key: tensor.to(patient.device) for key, tensor in row.items()}, mask


def training_model(patient: Patient) -> tuple[SpeculatorModel, dict[str, Any]]:
    """Returns the patient as training has it, in float32, and what its forward is given besides the row.

    Raises:
        SpeculatorsError: the algorithm cannot be built for training from what the checkpoint says.
    """
    model, config = patient.model, patient.config
    assert model is not None
    assert config is not None
    size = int(patient.facts["vocab_size"])
    ids = model.draft_to_target.cpu()
    reduced = len(ids) < size
    kwargs = {
        **{field.name: getattr(config, field.name) for field in type(config).recipe_fields()},
        "verifier_name_or_path": str(patient.verifier),
        "target_layer_ids": patient.layer_ids,
        "draft_vocab_size": len(ids),
        "num_layers": patient.decoder["num_hidden_layers"],
        "transformer_layer_config": patient.decoder,
        "speculators_config": config.speculators_config,
        "t2d": torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True) if reduced else None,
        "d2t": ids - torch.arange(len(ids)) if reduced else None,
        "dtype": "float32",
        "seed": 0,
    }
    built = build_model(config.speculators_model_type, patient.facts, kwargs)
    _, forward = trainer_kwargs(built, kwargs)
    built.float().load_state_dict(model.state_dict(), strict=False)
    return built.to(patient.device).eval(), forward


@torch.no_grad()
def _accuracies(
    model: SpeculatorModel, row: dict[str, torch.Tensor], kwargs: dict[str, Any], seed: int
) -> tuple[dict[int, float], float]:
    """Returns accuracy_k of the forward by k, the share of rows whose drafts up to k are all right, and the loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _, loss, metrics = model(**row, **kwargs)
    named = {key.removeprefix("accuracy_"): value for key, value in metrics.items() if key.startswith("accuracy_")}
    return {int(depth): float(value) for depth, value in sorted(named.items()) if depth.isdecimal()}, float(loss)


def _replayed(
    model: SpeculatorModel, row: dict[str, torch.Tensor], mask: torch.Tensor, depths: int
) -> dict[int, tuple[float, float]]:
    """Returns the same of replay, by depth, and the share of rows whose drafts are near ties."""
    tokens, size = row["input_ids"][0].cpu(), len(mask)
    names = ("hidden_states", "input_ids", "position_ids", "document_ids")
    rows = torch.arange(size)
    right = complete = torch.ones(size, dtype=torch.bool)
    tied = torch.zeros(size, dtype=torch.bool)
    found = {}
    replayed = model.replay(**{name: row[name] for name in names}, num_speculative_tokens=depths)
    for depth, logits in enumerate(replayed, start=1):
        place = rows + 1 + depth
        there = place < size
        held = torch.zeros(size, dtype=torch.bool)
        held[there] = mask[place[there]]
        best = logits.float().cpu().topk(min(2, logits.shape[1]), dim=-1)
        hit = model.draft_to_target.cpu()[best.indices[:, 0]] == tokens[place.clamp_max(size - 1)]
        complete, right = complete & held, right & hit & held
        margin = best.values[:, 0] - best.values[:, -1]
        tied = tied | (held & (margin <= NEAR_TIE * best.values[:, 0].abs()))
        count = max(1, int(complete.sum()))
        found[depth] = (float(right.sum()) / count, float((tied & complete).sum()) / count)
    return found
