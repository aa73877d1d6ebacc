"""The part `kernels`: attention and head loss at real shapes, in bf16 on the device against wider references.

The attention's reference is the same function in float64 on the CPU: another code path, which tests/nn compares with
one dense softmax. The head loss's is one product, softmax and divergence by autograd in float32 on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from benchmarks.gpu.shapes import facts_of
from speculators.facts import VerifierFacts
from speculators.losses import LOSSES, head_loss
from speculators.nn.attention import unrolled_attention
from speculators.nn.block import Blocks, block_attention
from speculators.nn.cache import KeyBuffer
from speculators.nn.layout import Segment

SHAPES = {
    "8B": "llama-3.1-8b",
    "70B": "llama-3.3-70b",
    "gpt-oss": "gpt-oss-20b",
    "Qwen3-Next": "qwen3-next-80b-a3b",
}
# Relative to the reference's norm: bf16 keeps 8 bits, and a result is rounded a few times on its way (0.9% was the most
# that whole updates of tiny models showed on the CPU).
TOLERANCE = 0.02
DEPTHS = 3
Attend = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields four lines for each shape."""
    for name, fixture in SHAPES.items():
        facts = facts_of(fixture, small=setup.small)
        window = facts.get("sliding_window") if facts.get("use_sliding_window", True) else None
        yield judged(f"{name}: unrolled attention", partial(unrolled, setup, facts, window))
        yield judged(f"{name}: block attention", partial(blocks, setup, facts, window))
        yield judged(f"{name}: attention in decoding", partial(decoding, setup, facts))
        yield judged(f"{name}: fused head loss", partial(fused_head, setup, facts))
        setup.release()


def _random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Draws on the CPU, so that both sides start from the same values, rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _with_gradients(attend: Attend, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Computes the output and the gradients of its weighted sum."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = attend(leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def _compared(setup: PartSetup, attend: Attend, inputs: Sequence[torch.Tensor], shape: tuple[int, ...]) -> Judged:
    """Compares bf16 on the device with float64 on the CPU, and times forward and backward on the device."""
    weight = _random(shape)[0]
    there = [each.to(setup.device) for each in inputs]
    run = partial(_with_gradients, attend, there, weight.to(setup.device))
    error = _error(run(), _with_gradients(attend, [each.double() for each in inputs], weight.double()))
    return _figures(setup, error, run)


def _error(mine: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Finds the largest error of a tensor, relative to its reference's norm."""
    pairs = [(a.detach().to(b.device, b.dtype), b) for a, b in zip(mine, reference, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


def _figures(setup: PartSetup, error: float, run: Callable[[], object]) -> Judged:
    fault = "" if error < TOLERANCE else f"the relative error is {error:.3g}, above {TOLERANCE}"
    return {"relative_error": error, "ms": setup.milliseconds(run)}, fault


def unrolled(setup: PartSetup, facts: VerifierFacts, window: int | None) -> Judged:
    """Attends at depth 2: two documents, the first with answers only at its end."""
    ends = (20, 32) if setup.small else (700, 1536)
    segments = (Segment(0, ends[0] // 5, ends[0]), Segment(ends[0], ends[0], ends[1]))
    rows, heads, keys = sum(s.stop - s.first for s in segments), facts.num_attention_heads, facts.num_key_value_heads
    query, key, own = (rows, heads, facts.head_dim), (ends[1], keys, facts.head_dim), (rows, keys, facts.head_dim)

    def attend(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        q, k, v, *rest = tensors
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        return unrolled_attention(q, (k, v), pairs, segments, scale=facts.head_dim**-0.5, window=window)

    return _compared(setup, attend, _random(query, key, key, *[own] * 4), query)


def blocks(setup: PartSetup, facts: VerifierFacts, window: int | None) -> Judged:
    """Attends from blocks of 16 to two documents and to the block itself."""
    size, block = (32, 4) if setup.small else (1536, 16)
    anchors = torch.arange(1, size, 2 * block)
    sizes = torch.full_like(anchors, block)
    laid = Blocks.of(anchors, sizes, anchors + 1, ((0, size // 2), (size // 2, size)))
    rows, keys = int(sizes.sum()), facts.num_key_value_heads
    query, key, own = (
        (rows, facts.num_attention_heads, facts.head_dim),
        (size, keys, facts.head_dim),
        (rows, keys, facts.head_dim),
    )

    def attend(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        q, k, v, own_k, own_v = tensors
        return block_attention(q, (k, v), (own_k, own_v), laid, scale=facts.head_dim**-0.5, window=window)

    return _compared(setup, attend, _random(query, key, key, own, own), query)


def decoding(setup: PartSetup, facts: VerifierFacts) -> Judged:
    """Attends with the queries of one round of seven drafts over 2,048 cached keys."""
    cached, rows = (40, 3) if setup.small else (2048, 8)
    old, own = ((tokens, facts.num_key_value_heads, facts.head_dim) for tokens in (cached, rows))
    query = (rows, facts.num_attention_heads, facts.head_dim)
    inputs = _random(old, old, query, own, own)

    def attend(buffer: KeyBuffer, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return buffer.attend(0, *tensors, start=cached, scale=facts.head_dim**-0.5)

    sides = []
    for k, v, *new in ([each.to(setup.device) for each in inputs], [each.double() for each in inputs]):
        buffer = KeyBuffer()
        buffer.write(0, k, v, 0)
        sides.append(partial(attend, buffer, new))
    mine, reference = sides
    return _figures(setup, _error([mine()], [reference()]), mine)


def fused_head(setup: PartSetup, facts: VerifierFacts) -> Judged:
    """Computes the divergence of three depths over the whole vocabulary, and the gradients of states and head."""
    places, width, vocab = 32 if setup.small else 512, facts.hidden_size, facts.vocab_size
    states, targets = (x.to(setup.device) for x in _random((DEPTHS, places, width), (places, width)))
    head = _random((vocab, width))[0].to(setup.device) * 0.02
    weights = torch.full((DEPTHS, places), 1 / places, device=setup.device)

    def fused() -> list[torch.Tensor]:
        leaves = states.detach().requires_grad_(), head.detach().requires_grad_()
        loss = head_loss(*leaves, weights, lambda part: (targets[part] @ head.T).float(), LOSSES.get("kl_div"))
        return [loss.per_depth.detach(), *torch.autograd.grad(loss.per_depth.sum(), leaves)]

    def plain() -> list[torch.Tensor]:
        leaves = [states.float().requires_grad_(), head.float().requires_grad_()]
        target = (targets.float() @ head.float().T).log_softmax(-1)
        totals = []
        for depth in leaves[0]:
            draft = (depth @ leaves[1].T).log_softmax(-1)
            totals.append((target.exp() * (target - draft)).sum(-1).mean())
        return [torch.stack(totals).detach(), *torch.autograd.grad(torch.stack(totals).sum(), leaves)]

    return _figures(setup, _error(fused(), plain()), fused)
