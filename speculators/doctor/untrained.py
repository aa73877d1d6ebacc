"""Finds weights that look as if training never reached them, or as if they had been rounded away.

Independent random numbers leave three marks on a matrix. No singular value lies far above s (sqrt(m) + sqrt(n)), s
being their deviation (the edge of Marchenko and Pastur; Johnstone 2001 gives centre and scale of the fluctuations). The
mean squares of its rows, and of its columns, differ only by chance. And its entries have the kurtosis of the
distribution that initialisations draw from, uniform or normal. Training breaks at least one of them: it adds directions
that stand out, spares the columns of inputs that are always small, or adds to a uniform start something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from speculators.doctor.check import Check, Family, listed
from speculators.doctor.frozen import EMBEDDINGS, HEAD, NORM
from speculators.doctor.speculator import ExaminedSpeculator

LOADS = Family("loads")
# Standard deviations that noise does not reach in thousands of matrices.
MOST_ERRORS = 6.0
# Kurtosis of the two distributions, and by how much 128 x 128 draws may miss it.
UNIFORM, NORMAL = (1.8, 0.04), (3.0, 0.2)
# In smaller matrices what training adds may drown in the random start; a larger one is judged by this many of its rows.
LEAST_SIZE, MOST_ROWS = 128, 4096
# A matrix of 16-bit floats has thousands of different values; 8 bits have at most 256.
VALUES_8_BITS, LEAST_ENTRIES = 256, 10_000


def check_untrained(speculator: ExaminedSpeculator, *, accepts: bool | None) -> Iterator[Check]:
    """Yields the check for noise and constants, then that for coarse rounding.

    Args:
        speculator: the readable speculator.
        accepts: whether drafts are accepted at all; None if unknown. It decides whether untrained parts are wrong.
    """
    own = {
        name: tensor
        for name, tensor in speculator.tensors.items()
        if tensor.is_floating_point() and name in speculator.trainable and name not in (HEAD, EMBEDDINGS, NORM)
    }
    yield _trained(own, accepts)
    yield _coarse(speculator.tensors)


def _trained(tensors: Mapping[str, torch.Tensor], accepts: bool | None) -> Check:
    name = "trained parts"
    matrices = {key: one for key, one in tensors.items() if one.ndim == 2 and min(one.shape) >= LEAST_SIZE}
    marks = {key: above_noise(one) for key, one in matrices.items()}
    noise = [key for key, mark in marks.items() if mark < 1]
    flat = [f"{key} (all {float(one[0]):g})" for key, one in tensors.items() if one.ndim == 1 and _constant(one)]
    if not marks and not flat:
        return LOADS.skipped(name, f"there is no trained matrix of at least {LEAST_SIZE} rows and columns")
    problems = [
        f"like random numbers: {listed(noise)} (spectrum, rows, columns and kurtosis are those of noise)"
    ] * bool(noise)
    problems += [f"one value throughout: {listed(flat)}"] * bool(flat)
    if not problems:
        least = min(marks, key=lambda key: marks[key], default="")
        figures = f", the least {least}, by {marks[least]:.1f} times what noise reaches" if least else ""
        return LOADS.ok(name, f"all {len(marks)} matrices stand out from noise{figures}")
    evidence = f"{'; '.join(problems)}: never trained, or lost in a conversion"
    if accepts is False:
        return LOADS.wrong(name, evidence, "restore these tensors from the run's checkpoint, or export again")
    return LOADS.warning(name, evidence, "check that training updates these tensors, and that the export kept them")


def above_noise(matrix: torch.Tensor) -> float:
    """Computes how far the most telling mark of a matrix exceeds what random numbers reach; below 1 it is noise."""
    values = matrix[:: -(-len(matrix) // MOST_ROWS)].double()
    values = values - values.mean()
    deviation = values.std()
    if not deviation:
        return 0.0
    values = values / deviation
    kurtosis = float(values.pow(4).mean())
    errors = [_edge(values), *(_spread(values, axis, kurtosis) for axis in (0, 1))]
    distribution = min(abs(kurtosis - center) / width for center, width in (UNIFORM, NORMAL))
    return max(distribution, max(errors) / MOST_ERRORS)


def _edge(values: torch.Tensor) -> float:
    """The largest squared singular value, centred and scaled as in Johnstone 2001; noise gives -1.2 +- 1.3."""
    largest: float = torch.linalg.matrix_norm(values, ord=2).square().item()
    # With a = sqrt(n - 1), b = sqrt(p): mean (a + b)^2, scale (a + b) (1 / a + 1 / b)^(1/3).
    one, other = max(values.shape) ** 0.5, (min(values.shape) - 1) ** 0.5
    scale: float = (one + other) * (1 / one + 1 / other) ** (1 / 3)
    return float((largest - (one + other) ** 2) / scale)


def _spread(values: torch.Tensor, axis: int, kurtosis: float) -> float:
    """Variance of the mean squares along an axis, in standard errors of what independent entries give."""
    squares = values.square().mean(axis)
    expected = (kurtosis - 1) / values.shape[axis]
    return float((squares.var() / expected - 1) / (2 / len(squares)) ** 0.5)


def _constant(vector: torch.Tensor) -> bool:
    return len(vector) > 1 and bool((vector == vector[0]).all())


def _coarse(tensors: Mapping[str, torch.Tensor]) -> Check:
    name = "rounding"
    floats = {key: one for key, one in tensors.items() if one.is_floating_point() and one.numel() >= LEAST_ENTRIES}
    if not floats:
        return LOADS.skipped(name, f"no tensor has {LEAST_ENTRIES:,} entries")
    counts = {key: _values(one) for key, one in floats.items()}
    coarse = [f"{key} ({count})" for key, count in counts.items() if 1 < count <= VALUES_8_BITS]
    if coarse:
        evidence = f"at most {VALUES_8_BITS} different values, so rounded to 8 bits or fewer: {listed(coarse)}"
        return LOADS.warning(name, evidence, "export from weights that were not quantised, or measure what this costs")
    return LOADS.ok(name, f"{len(floats)} tensors have more different values than 8 bits can tell apart")


def _values(tensor: torch.Tensor) -> int:
    """Counts the different values among the first entries, more than enough to exceed 256."""
    return len(tensor.flatten()[: 100 * LEAST_ENTRIES].float().unique())
