"""Head projection, softmax and loss in one operation, in parts over places, forward and backward in the same pass.

Logits, the draft's as well as the verifier's, only ever exist for some of the places, so that peak memory does not grow
with vocabulary x sequence. For each part the verifier's rows are projected and softmaxed once, and every depth's states
run against them. The gradient with respect to the logits is known in closed form and overwrites them. With it the
gradients of states and head are formed at once, dH = G W and dW = G^T H, and backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from speculators.chunks import CHUNKS
from speculators.losses.functions import Draft, Loss, Target

# Measures C places of one depth beside their loss; gives [C].
Measure = Callable[[Draft, Target], torch.Tensor]
# Gives weights [K, N] that depend on the drafts, from `right` and `measured` as `HeadLoss` has them.
Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@attrs.frozen(eq=False)
class HeadLoss:
    """The loss of K depths at N places.

    Attributes:
        per_depth: [K] sum over places of weight * loss, differentiable in states and head.
        right: [K, N] bool, whether the draft's most likely token is the verifier's most likely of the draft vocabulary.
        measured: [K, N] what `measure` gives, without gradient; 0 where nothing is measured.
        weights: [K, N] of the predictions.
    """

    per_depth: torch.Tensor
    right: torch.Tensor
    measured: torch.Tensor
    weights: torch.Tensor


def product_rows(vocab: int, device_type: str) -> int:
    """Limits the rows of one product with the head of a draft vocabulary of `vocab` tokens."""
    chunks = CHUNKS[device_type]
    return max(1, min(chunks.product_rows, chunks.product_elements // vocab))


@attrs.frozen(eq=False)
class _Heads:
    """The heads of K depths, one for all of them or one for each, and their gradients.

    Attributes:
        weights: [D, H] each, in the dtype of the products.
        depths: those that each head predicts.
        grads: [D, H - F] each, of the last columns, those after the F frozen ones; None where all are frozen. One for
            all depths of a head. How much of the incoming gradient each depth gets is not known yet, so it is exact
            only if all depths get the same factor: `head_loss` asks callers to use the sum as a whole.
    """

    weights: list[torch.Tensor]
    depths: list[slice]
    grads: list[torch.Tensor | None]

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor],
        frozen: torch.Tensor | None,
        depths: int,
        wide: torch.dtype,
        dtype: torch.dtype,
    ) -> _Heads:
        whole = [weight.detach().to(dtype) for weight in weights]
        if frozen is not None:
            whole = [torch.cat((frozen.to(dtype), weight), 1) for weight in whole]
        step = depths // len(weights)
        return cls(
            weights=whole,
            depths=[slice(first, first + step) for first in range(0, depths, step)],
            grads=[torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None for weight in weights],
        )

    def product_places(self, device_type: str) -> int:
        """Limits the places of which all depths are projected at once."""
        rows = product_rows(len(self.weights[0]) * len(self.weights), device_type)
        return max(1, rows // (self.depths[0].stop - self.depths[0].start))

    def logits(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Projects [K, P, H]; [K / heads, P, D] of each head."""
        return [rows[depths] @ weight.T for weight, depths in zip(self.weights, self.depths, strict=True)]

    def backward(
        self, grads: list[torch.Tensor], rows: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None
    ) -> None:
        """Forms gradients from those of `logits`: writes the states' to `out` [K, P, H], and adds up the heads' own.

        Args:
            scale: [K, P, 1], weights of the predictions.
        """
        for weight, depths, total, grad in zip(self.weights, self.depths, self.grads, grads, strict=True):
            if out is not None:
                out[depths] = (grad @ weight) * scale[depths]
            if total is not None:
                scaled = (rows[depths, :, -total.shape[1] :] * scale[depths]).to(weight.dtype)
                total += grad.flatten(0, 1).T @ scaled.flatten(0, 1)


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        frozen: torch.Tensor | None,
        place_weights: torch.Tensor,
        target_logits: Callable[[slice], torch.Tensor],
        loss: Loss,
        measure: Measure | None,
        compute_dtype: torch.dtype,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        depths, places, _ = states.shape
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        values = torch.zeros(depths, places, dtype=wide, device=states.device)
        right = torch.zeros(depths, places, dtype=torch.bool, device=states.device)
        measured = torch.zeros_like(values)
        grad_states = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        heads = _Heads.of(weights, frozen, depths, wide, compute_dtype)
        together = heads.product_places(states.device.type)
        chunk = max(1, CHUNKS[states.device.type].softmax_elements // len(weights[0]))
        # Outer loop: one product with the head. Inner loop: softmax and loss, in smaller chunks.
        for first in range(0, places, together):
            taken = slice(first, first + together)
            rows = states[:, taken].to(compute_dtype)  # [K, P, H]
            targets = target_logits(taken)  # [P, D]
            # First the logits, then in their place their gradients.
            logits = heads.logits(rows)
            by_depth = [each for of_head in logits for each in of_head]  # K times [P, D]
            for start in range(0, rows.shape[1], chunk):
                part = slice(start, start + chunk)
                target = Target(targets[part].to(wide))
                for depth in range(depths):
                    draft = Draft(by_depth[depth][part].to(wide))
                    value, grad = loss(draft, target)
                    values[depth, taken][part] = value
                    right[depth, taken][part] = draft.is_right(target)
                    if measure is not None:
                        measured[depth, taken][part] = measure(draft, target)
                    by_depth[depth][part] = grad
            scale = place_weights[:, taken, None]
            heads.backward(logits, rows, scale, None if grad_states is None else grad_states[:, taken])
        totals = torch.linalg.vecdot(values, place_weights.to(wide))
        ctx.save_for_backward(grad_states, *heads.grads)
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.mark_non_differentiable(right, measured)
        return totals, values, right, measured

    @staticmethod
    def backward(
        ctx: Any, grad_totals: torch.Tensor | None, grad_values: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        grad_states, *grad_heads = ctx.saved_tensors
        if grad_states is not None:
            # In place: nobody else has this tensor, and it is as large as the states. Callers use either the totals or
            # the values, so one of the two gradients is None.
            factor = grad_values if grad_totals is None else grad_totals[:, None]
            if factor is None:
                grad_states = None
            else:
                grad_states.mul_(factor[..., None])
        if grad_totals is not None:
            factors = grad_totals[:: len(grad_totals) // len(grad_heads)]
            grad_heads = [
                None if grad is None else (grad * factor).to(dtype)
                for grad, factor, dtype in zip(grad_heads, factors, ctx.dtypes, strict=True)
            ]
        return grad_states, *(None,) * 6, *grad_heads


def head_loss(
    states: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    place_weights: torch.Tensor | Weigh,
    target_logits: Callable[[slice], torch.Tensor],
    loss: Loss,
    *,
    frozen: torch.Tensor | None = None,
    measure: Measure | None = None,
) -> HeadLoss:
    """Computes the weighted loss of K depths at N target places without storing their logits.

    Matrix products run in the autocast dtype if autocast is on, softmax and loss in float32. Weights that depend on the
    drafts cost nothing with a frozen head, whose losses can be weighted afterwards. The gradient of a trained head is
    formed with the weights, so a pass without gradients finds them first.

    Args:
        states: [K, N, H], the draft's normed states; states[k, n] predicts place n at depth k.
        weight: [D, H], the draft head, or a head of each depth.
        place_weights: [K, N] float, weight of each prediction (mask, depth weight, 1 / supervised tokens), or what
            computes it from the drafts. Use the sum of `per_depth` as a whole: the head's gradient is formed before
            depths could be scaled apart.
        target_logits: gives the verifier's logits [C, D] over the draft vocabulary for a slice of the N places.
        loss: one of `losses.functions`, or a mixture.
        frozen: [D, F], columns of the head before those of `weight` [D, H - F], without a gradient.
        measure: of each prediction beside its loss.
    """
    heads = (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)
    trained = any(head.requires_grad for head in heads)
    options: dict[str, Any] = {"frozen": frozen, "measure": measure}
    if isinstance(place_weights, torch.Tensor):
        per_depth, _, right, measured = _apply(states, heads, place_weights, target_logits, loss, **options)
        return HeadLoss(per_depth, right, measured, place_weights)
    # Detached where a second pass follows: even under no_grad, the first would form gradients of what requires them.
    first = (states.detach(), tuple(head.detach() for head in heads)) if trained else (states, heads)
    _, values, right, measured = _apply(*first, None, target_logits, loss, **options)
    weights = place_weights(right, measured)
    if trained:
        return head_loss(states, heads, weights, target_logits, loss, **options)
    return HeadLoss(torch.linalg.vecdot(values, weights.to(values.dtype)), right, measured, weights)


def place_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    target_logits: Callable[[slice], torch.Tensor],
    loss: Loss,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the loss of each of N places, for weights that depend on the losses themselves.

    Args:
        states: [N, H].
        weight: [D, H], a frozen head: its gradient could not be formed before the weights are known.
        target_logits: as of `head_loss`.
        loss: as of `head_loss`.

    Returns:
        The losses [N], differentiable in states, and whether the draft is right, [N] bool.
    """
    assert not weight.requires_grad, "the head of place_loss is frozen"
    _, values, right, _ = _apply(states[None], (weight,), None, target_logits, loss)
    return values[0], right[0]


def _apply(
    states: torch.Tensor,
    heads: Sequence[torch.Tensor],
    place_weights: torch.Tensor | None,
    target_logits: Callable[[slice], torch.Tensor],
    loss: Loss,
    *,
    frozen: torch.Tensor | None = None,
    measure: Measure | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calls the operation in the precision of the moment; `place_weights` None stands for ones."""
    if place_weights is None:
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        place_weights = torch.ones(states.shape[:2], device=states.device, dtype=wide)
    device_type = states.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else states.dtype
    # The products choose their dtype themselves; autocast would also touch the losses.
    with torch.autocast(device_type, enabled=False):
        return _FusedHeadLoss.apply(states, frozen, place_weights, target_logits, loss, measure, dtype, *heads)
