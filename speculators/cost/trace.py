"""Traces a row's forward and backward without storage: which tensors would live at once, and how many products.

The model is built from fake tensors, which have a shape and no values, and the training code itself runs on them. So
the counts are those of that code, for any algorithm whose forward never reads values from the device (a house rule).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from speculators.chunks import CHUNKS
from speculators.contract import build_model, trainer_kwargs
from speculators.cost.costs import RowCost
from speculators.losses.fused import product_rows
from speculators.model import SpeculatorModel
from speculators.nn.layout import RowLayout
from speculators.pipeline.arguments import stand_in_vocabulary, training_kwargs
from speculators.recipe.plan import Plan
from speculators.training.optimizer import Optimizer
from speculators.verifier.head import HeadRules, VerifierHead

_aten = torch.ops.aten

# Rows x vocabulary per traced softmax, at least.
TRACED_ELEMENTS = 2**22


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, for as long as they live.

    Args:
        wide: a tensor of at most `wide[0]` rows (over all depths) and `wide[1]` columns is a chunk buffer.

    Attributes:
        peak: the most bytes at once.
        chunk_peak: the most bytes of chunk buffers at once.
        chunk_at_peak: bytes of chunk buffers when `peak` was reached.
    """

    def __init__(self, wide: tuple[int, int]) -> None:
        super().__init__()
        self.wide = wide
        self.now = self.peak = self.chunk_now = self.chunk_peak = self.chunk_at_peak = 0
        self._storages: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts what it allocated."""
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return made

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Leaves out storages that existed before, which would be counted when an operation makes a view of them."""
        for tensor in tensors:
            self._storages[tensor.untyped_storage()._cdata] = (0, False)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        rows, columns = self.wide
        chunk = tensor.ndim > 1 and tensor.shape[-1] == columns and tensor.numel() <= rows * columns
        size = storage.nbytes()
        self._storages[key] = (size, chunk)
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.chunk_now += size * chunk
        self.chunk_peak = max(self.chunk_peak, self.chunk_now)
        if self.now > self.peak:
            self.peak, self.chunk_at_peak = self.now, self.chunk_now

    def _drop(self, key: int) -> None:
        size, chunk = self._storages.pop(key)
        self.now -= size
        self.chunk_now -= size * chunk


def trace(plan: Plan, lengths: Sequence[int], supervised: float, *, kind: str) -> RowCost:
    """Traces one row of documents of `lengths`; the last part of each, a share of `supervised`, is its answer.

    Args:
        kind: type of the device whose chunks the row is computed in.

    Raises:
        Exception: whatever a plug-in raises without a verifier, or when it reads values that do not exist.
    """
    facts, name = plan.facts, plan.recipe.algorithm.name
    rules = HeadRules.of(facts)
    row, layout = row_of(lengths, supervised)
    # The layout's index tensors are real, because the host knows them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        kwargs = training_kwargs(plan, None, stand_in_vocabulary(plan))
        model = build_model(name, facts, kwargs)
        head = attach_head(model, plan, rules)
        optimizer = Optimizer(model, plan.recipe.schedule.optimizer, ema=plan.recipe.schedule.ema)
        with flop_counter() as update:
            optimizer.prime()
        # The forward may draw anchors; each plan draws the same ones, and leaves the caller's generator alone.
        with flop_counter() as products, _chunks_of(kind), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            live = _pass(model, {**states_of(plan, layout.size), **row}, layout, kwargs)
        sizes = {parameter: parameter.numel() * parameter.itemsize for parameter in model.parameters()}
        trained = [parameter for parameter in sizes if parameter.requires_grad]
        state = optimizer.tensors()
    own = model.saved_names(dict(model.named_parameters())).values()
    trainable = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return RowCost(
        trainable=trainable,
        frozen=sum(parameter.numel() for parameter in own) - trainable,
        trainable_bytes=sum(sizes[parameter] for parameter in trained),
        frozen_bytes=sum(sizes.values()) - sum(sizes[parameter] for parameter in trained),
        head_bytes=head,
        optimizer_bytes=sum(value.numel() * value.itemsize for value in state.values()),
        momentum_bytes=sum(value.numel() * value.itemsize for key, value in state.items() if key.endswith(_WHOLE)),
        activation_bytes=live.peak - live.chunk_at_peak,
        chunk_bytes=live.chunk_peak,
        row_flops=products.get_total_flops(),
        update_flops=update.get_total_flops(),
    )


# The state that WholeMuon keeps whole on every process, by torch's name for it.
_WHOLE = ".momentum_buffer"


@contextmanager
def _chunks_of(kind: str) -> Iterator[None]:
    """Gives the traced tensors, which say that they are on a CPU, another device's chunks while the block runs.

    Few operations, since each takes the same time at any size: a CPU's small softmaxes are traced together.
    """
    own, traced = CHUNKS["cpu"], CHUNKS[kind]
    CHUNKS["cpu"] = attrs.evolve(traced, softmax_elements=max(traced.softmax_elements, TRACED_ELEMENTS))
    try:
        yield
    finally:
        CHUNKS["cpu"] = own


def row_of(lengths: Sequence[int], supervised: float) -> tuple[dict[str, torch.Tensor], RowLayout]:
    """Builds a row of documents of `lengths` tokens, without states: tensors [1, S] on the host, and their layout.

    Args:
        supervised: share of each document's tokens, at its end.
    """
    sizes = torch.tensor(list(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    mask = positions >= (sizes * (1 - supervised)).round().long()[documents]
    row = {
        "input_ids": torch.zeros_like(positions)[None],
        "loss_mask": mask[None],
        "position_ids": positions[None],
        "document_ids": documents[None],
    }
    return row, RowLayout.of(row["document_ids"], row["loss_mask"])


def states_of(plan: Plan, tokens: int) -> dict[str, torch.Tensor]:
    """Allocates the states of a row as a forward takes them, [1, tokens, ...], without values."""
    width = plan.facts.hidden_size
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    return {
        "hidden_states": torch.empty(1, tokens, len(plan.target_layer_ids) * width, dtype=dtype),
        "verifier_last_hidden_states": torch.empty(1, tokens, width, dtype=dtype),
    }


def attach_head(model: SpeculatorModel, plan: Plan, rules: HeadRules) -> int:
    """Gives the model the verifier's tensors, without values; returns the head's bytes."""
    kept = getattr(torch, file_dtype(plan))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(kept)
    # Every algorithm keeps the head under this name; it is None in a model that was built without a verifier.
    if not hasattr(model, "target_head"):
        return 0
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    width = plan.facts.hidden_size
    weight, norm = torch.empty(plan.draft_vocab_size, width, dtype=dtype), torch.empty(width, dtype=dtype)
    model.target_head = VerifierHead(weight, norm, rules)
    return (weight.numel() + norm.numel()) * weight.itemsize


def file_dtype(plan: Plan) -> str:
    """Names the dtype of the verifier's file, which frozen tensors keep."""
    return str(plan.facts.get("dtype") or plan.facts.get("torch_dtype") or "float32").removeprefix("torch.")


def _pass(
    model: SpeculatorModel, batch: Mapping[str, torch.Tensor], layout: RowLayout, kwargs: Mapping[str, Any]
) -> LiveBytes:
    """Runs forward and backward with gradients in place, as from an update's second row on."""
    train_kwargs, _ = trainer_kwargs(model, kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    columns = kwargs["draft_vocab_size"]
    live = LiveBytes((product_rows(columns, "cpu"), columns))
    live.ignore(iter([*model.parameters(), *model.buffers(), *batch.values()]))
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kwargs["dtype"] == "bfloat16"):
            _, loss, _ = model(**batch, layout=layout, **train_kwargs)
        loss.backward()
    return live


def flop_counter() -> FlopCounterMode:
    """Makes torch's counter of products, extended by the attention kernels that it does not know."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def _attention_flops(q: Any, k: Any, *rest: Any, **_: Any) -> int:
    """Two products of [q, d] x [d, k] per head; a causal block computes half. `rest` is values, dropout, causal."""
    batch, heads, queries, size = q
    causal = len(rest) > 2 and rest[2]
    return 4 * batch * heads * queries * k[2] * size // (2 if causal else 1)


def _attention_backward_flops(_grad: Any, q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Five products: scores again, and the gradients of scores, queries, keys and values. `rest` adds out, lse."""
    return _attention_flops(q, k, v, *rest[2:]) * 5 // 2


_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
