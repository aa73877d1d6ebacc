"""A CUDA device without a GPU: tensors that say they are on cuda:0 and keep their values in a CPU tensor.

What it shows: an operation that mixes devices raises, as on a GPU; what makes the host wait for the device is counted,
by the line that asked for it; operations that a GPU refuses while deterministic algorithms are on are refused. What it
cannot show: speed, memory, the GPU's own rounding, and whether its kernels exist. Needs hooks.cpp in LD_PRELOAD.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import speculators
from speculators.nn import flex

SOURCES = Path(speculators.__file__).parent
CUDA = torch.device("cuda", 0)

# The host waits in these, whatever they are called with; in others it depends on the arguments (`_waits`).
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount"}
# An index on the CPU is copied over; all other operations refuse to mix devices.
TAKES_HOST_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy"}
# Refused on CUDA while deterministic algorithms are on, from the documentation of use_deterministic_algorithms, and of
# floats alone; flash attention's backward then sums in one order.
REFUSED = {"kthvalue", "put_", "_scaled_dot_product_efficient_attention_backward"}
REFUSED_FLOATS = {"cumsum", "histc"}

# Line of this project -> how often the host waited there.
waits: Counter[str] = Counter()


class CudaTensor(torch.Tensor):
    """Says it is on cuda:0; `host` has its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> CudaTensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        # Inference mode would refuse an inference tensor as the view of a weight.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(cls, host.size(), dtype=host.dtype, device=CUDA, **layout)

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:
        return f"CudaTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _Device().__torch_dispatch__(func, types, args, kwargs)

    def tolist(self) -> list:
        waits[f"tolist at {_line()}"] += 1
        return self.host.tolist()

    def __getitem__(self, key: Any) -> torch.Tensor:
        # torch would make the index on the device itself, where no mode sees it.
        return super().__getitem__(_tensor(key, dtype=torch.int64, device=CUDA) if isinstance(key, list) else key)

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new: CudaTensor) -> None:
        # torch exchanges the shell of a tensor alone, and its values would stay.
        torch.Tensor.data.__set__(self, new)
        self.host = new.host


class _Device(TorchDispatchMode):
    """Sends to the device what makes tensors there: factories, and copies of CPU tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Without autograd, as in inference mode, such an operation arrives whole, and its parts say what it does.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if _to_cuda(kwargs) or any(isinstance(each, CudaTensor) for each in tree_iter((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def device() -> Iterator[None]:
    """Makes torch find one GPU while the block runs."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "stand-in"
    torch.cuda.manual_seed_all = lambda _: None
    torch.cuda.synchronize = lambda *_: None
    torch.tensor = _tensor
    # Nothing can be compiled for this device, whose tiny heads and rows the true kernel would not take either.
    flex.kernel = lambda: _flex
    flex.SMALLEST_HEAD = flex.TILE = 8
    # Module.to: new parameters instead of new values in old ones, which stay on the CPU.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # A mode belongs to a thread, so backward must stay in this one.
    with torch.autograd.set_multithreading_enabled(False), _Device():
        yield


def _tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **options: Any) -> torch.Tensor:
    """torch.tensor, which allocates on the device itself, where no mode sees it."""
    # torch.get_default_device would ask torch.tensor.
    return make(data, device="cpu", **options).to(torch.empty(0).device if device is None else device)


def _to_cuda(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs one operation on the values, and gives its results the device that they would have."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    on_host = [each for each in tensors if not isinstance(each, CudaTensor)]
    may_mix = name in COPIES or (name in TAKES_HOST_INDEX and isinstance(args[0], CudaTensor))
    # Single numbers may stay on the CPU.
    if not may_mix and len(on_host) < len(tensors) and any(each.dim() for each in on_host):
        raise RuntimeError(f"{func} mixes cuda:0 and the CPU at {_line()}: {[tuple(t.shape) for t in tensors]}")
    if _waits(name, args, kwargs):
        waits[f"{name} at {_line()}"] += 1
    if torch.are_deterministic_algorithms_enabled() and _is_refused(name, args):
        raise RuntimeError(f"{func} is not deterministic on CUDA, at {_line()}")
    to_host = kwargs.get("device") is not None and not _to_cuda(kwargs)
    host_kwargs = {**kwargs, "device": "cpu"} if _to_cuda(kwargs) else kwargs
    result = KERNELS.get(name, func)(*tree_map(_host, args), **tree_map(_host, host_kwargs))
    if "out" in kwargs:
        return kwargs["out"]
    if not func._schema.returns:
        return None
    # An operation in place returns its own first argument.
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    return result if to_host else tree_map(_device_tensor, result)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, CudaTensor) else value


def _device_tensor(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) else value


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name == "copy_":
        return isinstance(args[1], CudaTensor) and not isinstance(args[0], CudaTensor)
    if name == "_to_copy":
        return isinstance(args[0], CudaTensor) and kwargs.get("device") is not None and not _to_cuda(kwargs)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    index = args[1] if name in TAKES_HOST_INDEX else []
    return name in WAITING or any(each.dtype in (torch.bool, torch.uint8) for each in index if each is not None)


def _is_refused(name: str, args: Any) -> bool:
    return name in REFUSED or (name in REFUSED_FLOATS and args[0].is_floating_point())


def _line() -> str:
    """The innermost line of this project."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(SOURCES):
            return f"{file.relative_to(SOURCES)}:{frame.lineno}"
    return "outside of the project"


def _flash(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, debug, *, scale, **window):
    """Computes what `_flash_attention_forward` documents: variable lengths, GQA, a window, the log-sum-exp."""
    assert q.dtype == k.dtype == v.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] % 8 == 0
    assert ends_q.dtype == ends_k.dtype == torch.int32
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for rows, keys in _documents(ends_q, ends_k, longest_q, longest_k):
        scores = _scores(q[rows], k[keys], scale, causal, **window)
        lse[:, rows] = scores.logsumexp(-1)
        values = _for_each_head(v[keys], q)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    nothing = torch.zeros(2, dtype=torch.int64)
    return out, lse, nothing, nothing, nothing


def _flash_backward(
    grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal, seed, offset, *, scale, **window
):
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape) for x in (q, k, v))
    for rows, keys in _documents(ends_q, ends_k, longest_q, longest_k):
        probs = (_scores(q[rows], k[keys], scale, causal, **window) - lse[:, rows, None]).exp()
        wide, delta = grad[rows].float(), (grad[rows].float() * out[rows].float()).sum(-1).T
        grad_probs = torch.einsum("qhd,khd->hqk", wide, _for_each_head(v[keys], q))
        grad_scores = probs * (grad_probs - delta[..., None]) * scale
        grad_q[rows] = torch.einsum("hqk,khd->qhd", grad_scores, _for_each_head(k[keys], q))
        for total, left, right in ((grad_k, grad_scores, q[rows].float()), (grad_v, probs, wide)):
            total[keys] = torch.einsum("hqk,qhd->khd", left, right).unflatten(1, (-1, group)).sum(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _flex(q, k, v, *, block_mask, scale, enable_gqa, kernel_options):
    """Computes what flex_attention documents, by its mask of pairs; that the tiles agree is tested in tests/nn."""
    assert q.dtype == k.dtype == v.dtype in (torch.float16, torch.bfloat16)
    queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    hidden = ~block_mask.mask_mod(0, 0, queries[:, None], keys)
    with torch.autocast("cuda", enabled=False):
        k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q.float() @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).to(q.dtype)


def _documents(ends_q, ends_k, longest_q, longest_k):
    spans = ([slice(*pair) for pair in pairwise(ends.tolist())] for ends in (ends_q, ends_k))
    for rows, keys in zip(*spans, strict=True):
        assert rows.stop - rows.start <= longest_q
        assert keys.stop - keys.start <= longest_k
        yield rows, keys


def _for_each_head(x, q):
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q, k, scale, causal, *, window_size_left=None, window_size_right=None):
    scores = torch.einsum("qhd,khd->hqk", q.float(), _for_each_head(k, q)) * scale
    # The last query sees the last key.
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    hidden = (ahead > 0) & causal
    if window_size_left is not None:
        hidden |= (ahead < -window_size_left) | (ahead > window_size_right)
    return scores.masked_fill(hidden, float("-inf"))


def _histogram(values, bins, *limits, **named):
    """Counts integers, as CUDA does; the CPU counts only floats."""
    return torch.histc(values.float(), bins, *limits, **named).to(values.dtype)


KERNELS = {
    "_flash_attention_forward": _flash,
    "_flash_attention_backward": _flash_backward,
    "histc": _histogram,
}
