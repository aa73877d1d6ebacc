"""Times the products of one forward of a 135M decoder with few rows, by how the weights are stored.

Decoding multiplies one row by every weight, verification one row for each drafted token and one more. Both read all
weights once; the time to add them up is printed for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

HIDDEN, INNER, VOCAB, LAYERS = 576, 1536, 49_152, 30
# q, k and v together; attention's output; gate and up together; down; the head.
SHAPES = [*[(960, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)] * LAYERS, (VOCAB, HIDDEN)]
ROWS = (1, 2, 4, 6, 8)
Products = Callable[[], object]


def milliseconds(products: Products, *, rounds: int = 9) -> float:
    """Runs the products and gives the median time, after two runs that warm up."""
    products(), products()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        products()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def stored(weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor], rows: int) -> dict[str, Products]:
    """Makes the same products with weights [out, in] as torch keeps them, column-major, and packed by oneDNN."""
    columns = [weight.t().contiguous() for weight in weights]
    made: dict[str, Products] = {
        "rows": lambda: [functional.linear(inputs[weight.shape[1]], weight) for weight in weights],
        "columns": lambda: [inputs[weight.shape[0]] @ weight for weight in columns],
    }
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, max(8, rows)) for weight in weights]
    except (AttributeError, RuntimeError):  # another build of torch, or a processor without such products
        return made
    pairs = [(inputs[weight.shape[1]], packed_weight) for weight, packed_weight in zip(weights, packed, strict=True)]
    linear = torch.ops.mkldnn._linear_pointwise
    return made | {"packed": lambda: [linear(x, weight, None, "none", [], "") for x, weight in pairs]}


@torch.inference_mode()
def main() -> None:
    """Prints one table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
        flat = torch.cat([weight.flatten() for weight in weights]).view(torch.float32)
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: {flat.numel() * 4 / 1e6:.0f} MB, added up in {milliseconds(flat.sum):.1f} ms")
        del flat
        for rows in ROWS:
            inputs = {size: torch.randn(rows, size).to(dtype) for size in (HIDDEN, INNER)}
            times = {name: milliseconds(run) for name, run in stored(weights, inputs, rows).items()}
            print(f"{rows:4} rows: " + ", ".join(f"{name} {spent:.1f} ms" for name, spent in times.items()))


if __name__ == "__main__":
    main()
