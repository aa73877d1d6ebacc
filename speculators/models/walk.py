"""The rounds that the acceptance of each draft saves, as weights of a training loss.

The supervised places of a turn, 0 .. L - 1, are a response that rounds emit. A round at anchor i drafts place i + k at
depth k = 0 .. K - 1, each accepted with probability a[k, i] given that those before it were, and

    S[j, i] = a[0, i] * .. * a[j - 1, i]     the first j drafts are all accepted; S[0, i] = 1, S[K + 1, i] = 0

If exactly j are accepted, the next anchor is i + j + 1. So the expected rounds from anchor i to the end are

    R[i] = 1 + sum_{j = 0..K} (S[j, i] - S[j + 1, i]) R[i + j + 1],     R[i] = 0 for i >= L

(speculators/bench/walk.py). With D[i] = R[i] - R[i + 1], the rounds saved by starting one token later, summation by
parts gives

    D[i] = 1 - sum_{j = 1..K} S[j, i] D[i + j]     or (1 + B) D = 1 with B[i, i + j] = S[j, i]

The whole walk takes R[0] = sum_i D[i] rounds, so that dR[0] = -V^T dB D with (1 + B)^T V = 1. In

    V[i] = 1 - sum_{j = 1..K} S[j, i - j] V[i - j]

the sum is the chance that a round jumps over i: V[i] is the chance that the walk visits anchor i. Then

    -dR[0] / da[k, i] = V[i] * S[k, i] * G[k, i],     G[k, i] = D[i + k + 1] + a[k + 1, i] G[k + 1, i]

is the chance of a visit, times the chance that the round reaches depth k, times the rounds that one more token saves
there. As acceptance length is tokens / R[0], these are the weights with which acceptance counts for it.
"""

from __future__ import annotations

import torch

from speculators.nn.layout import RowLayout, on_host


@on_host()
def responses_of(layout: RowLayout) -> torch.Tensor:
    """Numbers the turns of a row: [N] int64 on the host, equal for consecutive supervised places of a document."""
    places, starts = layout.places, layout.place_starts
    new = (places[1:] != places[:-1] + 1) | (starts[1:] != starts[:-1])
    return torch.cat((torch.zeros(min(1, len(places)), dtype=torch.int64), new.cumsum(0)))


@torch.no_grad()
def rounds_saved(accepted: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Computes the rounds of its response that each draft saves if it is accepted instead of rejected.

    That is -dR[0] / da, for R[0] is linear in each a. It is below 0 where acceptance leads to a worse anchor. The last
    place of a response saves nothing: a round emits a token of the verifier's own, too.

    Two triangular systems of N equations are solved on the device; a loop over places would wait for each.

    Args:
        accepted: [K, N] in 0..1, the acceptance of the draft of place n at depth k, from anchor n - k.
        responses: [N] int64 ascending, the response of each place, on the same device.

    Returns:
        [K, N]; 0 where anchor n - k lies in another response.
    """
    depths, count = accepted.shape
    places = torch.arange(count, device=accepted.device)
    steps = torch.arange(depths + 1, device=accepted.device)[:, None]

    def is_same(other: torch.Tensor) -> torch.Tensor:
        inside = (other >= 0) & (other < count)
        return inside & (responses[other.clamp(0, max(0, count - 1))] == responses)

    def shifted(values: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """values[k, to[k, i]]; 0 in another response."""
        return torch.where(is_same(to), values.gather(1, to.clamp(0, max(0, count - 1))), 0.0)

    chance = shifted(accepted, places + steps[:-1])  # [K, N], a[k, i]
    survive = torch.cat((torch.ones_like(chance[:1]), chance.cumprod(0)))  # [K + 1, N], S[j, i]
    ahead = places + steps[1:]  # [K, N], i + j
    # 1 + B without its ones, which are implied; a spare element takes what lies outside.
    index = torch.where(is_same(ahead), places * count + ahead, count * count)
    system = accepted.new_zeros(count * count + 1)
    system.scatter_(0, index.flatten(), (survive[1:] * is_same(ahead)).flatten())
    # Contiguous, or the solver copies it, which takes far longer than to solve it.
    system = system[:-1].view(count, count)
    ones = accepted.new_ones(count, 1)
    saved = torch.linalg.solve_triangular(system, ones, upper=True, unitriangular=True)  # D
    visits = torch.linalg.solve_triangular(system.T, ones, upper=False, unitriangular=True)  # V
    gains = list(shifted(saved.T.expand(depths, -1), ahead))  # D[i + k + 1], to become G[k, i]
    for depth in reversed(range(depths - 1)):
        gains[depth] = gains[depth] + chance[depth + 1] * gains[depth + 1]
    return shifted(visits[:, 0] * survive[:-1] * torch.stack(gains), places - steps[:-1])


def walk_weights(accepted: torch.Tensor, valid: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Weighs each draft by the rounds that it saves, at least 0, with a mean of 1 over the drafts of a row; [K, N].

    Args:
        accepted: as of `rounds_saved`.
        valid: [K, N] bool, there is such a draft.
        responses: as of `rounds_saved`.
    """
    saved = torch.where(valid, rounds_saved(accepted * valid, responses).clamp_min(0), 0.0)
    return saved * (valid.sum() / saved.sum().clamp_min(torch.finfo(saved.dtype).eps))
