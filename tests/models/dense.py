"""What the tests of algorithms share that read the verifier's last state alone."""

from __future__ import annotations

import torch

from speculators.bench.replay import replay
from speculators.bench.rows import Response, Row, judge
from speculators.bench.walk import greedy_rounds
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.model import SpeculatorModel
from speculators.verifier.weights import load_head

LAST = (4,)
REPLAYED = ("hidden_states", "input_ids", "position_ids", "document_ids")
# float32 sums in another order; losses are of order 10.
TOLERANCE = 2e-5


def row_of(world, *which: int) -> dict[str, torch.Tensor]:
    """A packed row of some conversations with the last state as `hidden_states`, answers supervised."""
    items = []
    for index in which:
        tokens = torch.tensor(world.prompts[index] + world.answers[index])
        mask = torch.arange(len(tokens)) >= len(world.prompts[index])
        items.append((Encoded(tokens.int().numpy(), mask.numpy()), world.engine.capture([tokens], LAST)[0]))
    return build_row(items, widths=(32, 32), dtype=torch.float32)


def with_padding(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The row with four places of padding after the first document and at the end."""
    holes = torch.full((1, 4), -1)
    first = int((row["document_ids"] == 0).sum())
    padded = {}
    for key, tensor in row.items():
        fill = holes if key == "document_ids" else torch.zeros(1, 4, *tensor.shape[2:], dtype=tensor.dtype)
        padded[key] = torch.cat([tensor[:, :first], fill, tensor[:, first:], fill], dim=1)
    return padded


def fit(model, kwargs, row, *, steps: int, lr: float = 5e-3) -> dict[str, torch.Tensor]:
    """Trains on one row and returns the last metrics."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        _, loss, metrics = model(**row, **kwargs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def gradients(model, kwargs, row, share: float = 1.0) -> tuple[float, list[torch.Tensor]]:
    """The loss of a row times `share`, and its gradient for every trained parameter."""
    _, loss, _ = model(**row, **kwargs)
    loss = loss * share
    return float(loss.detach()), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def check_packed_equals_unpacked(world, model, kwargs) -> None:
    """Loss and gradients of a packed row are those of its documents one by one; padding changes nothing."""
    packed = row_of(world, 0, 1, 2)
    singles = [row_of(world, index) for index in (0, 1, 2)]
    total = packed["loss_mask"].sum()
    parts = [gradients(model, kwargs, row, float(row["loss_mask"].sum() / total)) for row in singles]
    wanted = sum(loss for loss, _ in parts), [sum(grads) for grads in zip(*(grads for _, grads in parts), strict=True)]
    for row in (packed, with_padding(packed)):
        loss, grads = gradients(model, kwargs, row)
        assert abs(loss - wanted[0]) < TOLERANCE
        for mine, theirs in zip(grads, wanted[1], strict=True):
            assert (mine - theirs).abs().max() < TOLERANCE


def check_documents_are_apart(world, model) -> None:
    """Other tokens and states in the second document leave every logit of the first as it was."""
    row = row_of(world, 0, 1)
    first = row["document_ids"][0] == 0
    changed = {key: row[key].clone() for key in REPLAYED}
    changed["input_ids"][0, ~first] = 7
    changed["hidden_states"][0, ~first] = 1.0
    depths = [
        list(model.replay(**{key: each[key] for key in REPLAYED}, num_speculative_tokens=3)) for each in (row, changed)
    ]
    for depth, (before, after) in enumerate(zip(*depths, strict=True)):
        # Rows whose inputs leave the document may hold anything.
        kept = int(first.sum()) - 1 - depth
        assert torch.equal(before[:kept], after[:kept])


def check_empty_row(world, model, kwargs) -> None:
    """A row without supervised tokens has a loss and gradients of 0, for every parameter, never nan."""
    row = row_of(world, 0)
    row["loss_mask"] = torch.zeros_like(row["loss_mask"])
    loss, grads = gradients(model, kwargs, row)
    assert loss == 0.0
    assert all(grad.abs().max() == 0 for grad in grads)


def wide_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters in float64, with gradients where they are trained."""
    return {key: value.detach().double().requires_grad_(value.requires_grad) for key, value in model.named_parameters()}


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / rms(x) * weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def dense_layer(model, p, prefix: str, inputs: torch.Tensor, residual: torch.Tensor, history: list) -> torch.Tensor:
    """One more step of a Llama layer of the tiny verifier's shape (4 heads of 8, 2 with keys), naively.

    Args:
        p: parameters, float64.
        inputs: [n, H] what the attention reads.
        residual: [n, H].
        history: (keys, values) of the steps so far; this step's are appended.

    A query sees the first step's keys up to its own place, and of later steps its own key alone.
    """
    step, n, d = len(history), len(inputs), 8
    positions = torch.arange(n, dtype=torch.float64) + step
    theta = model.config.transformer_layer_config["rope_parameters"]["rope_theta"]
    angle = positions[:, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    projected = (inputs @ p[f"{prefix}self_attn.{name}_proj.weight"].T for name in ("q", "k", "v"))
    q, k, v = (each.unflatten(-1, (-1, d)) for each in projected)
    history.append((rotate(k), v))
    mask = torch.cat([torch.ones(n, n).tril().bool(), *[torch.eye(n, dtype=torch.bool)] * step], 1)
    keys, values = (torch.cat(held).repeat_interleave(2, 1) for held in zip(*history, strict=True))
    scores = torch.einsum("ihd,jhd->hij", rotate(q), keys) * d**-0.5
    mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values).flatten(1)
    x = residual + mixed @ p[f"{prefix}self_attn.o_proj.weight"].T
    y = norm(x, p[f"{prefix}post_attention_layernorm.weight"])
    gate, up = (y @ p[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (torch.nn.functional.silu(gate) * up) @ p[f"{prefix}mlp.down_proj.weight"].T


def judged(world, which, temperature: float = 0.0) -> list[Row]:
    """The verifier's own responses with their last states."""
    head = load_head(world.folder, world.engine.facts)
    rows = []
    for index in which:
        tokens = (*world.prompts[index], *world.answers[index])
        response = Response(id=str(index), category="", tokens=tokens, prompt_length=len(world.prompts[index]))
        states, last = world.engine.capture([torch.tensor(tokens)], LAST)[0]
        rows.append(judge(head, response, states, last, temperature=temperature))
    return rows


def accepted_share(world, model, which, k: int) -> float:
    """The share of drafts that is accepted over all rounds of the replay at T = 0, of K a round."""
    counts = replay(model, judged(world, which), k_max=k, temperature=0.0).counts(k)
    return float(counts.accepted.sum() / counts.reached.sum())


def live(world, model, row: Row, k: int):
    """The live decode of a response's prompt at T = 0."""
    return decode(
        CachedVerifier(world.engine.model, LAST),
        model.draft(),
        torch.tensor(row.response.prompt),
        max_new_tokens=len(row.response.answer),
        num_tokens=k,
        temperature=0.0,
        generator=None,
        stop_ids=frozenset(world.engine.stop_ids),
    )


def check_replay_equals_live(world, model, k: int = 3) -> None:
    """The walk over the replay and the live decode accept the same drafts each round, and the output is lossless."""
    rows = judged(world, range(6))
    tables = replay(model, rows, k_max=k, temperature=0.0).acceptance
    for row, table in zip(rows, tables, strict=True):
        decoded = live(world, model, row, k)
        assert tuple(decoded.tokens) == row.response.answer
        assert [(each.anchor, each.accepted) for each in decoded.rounds] == greedy_rounds(table, k)


def check_replay_logits_equal_live(world, model, monkeypatch, module, depths: int = 3) -> None:
    """At every depth the logits that a live round draws from are the replay's, within float32 of another order.

    The live round is made to draft the row's own tokens, by replacing the choice of a token in `module`.
    """
    tokens = torch.tensor(world.prompts[1] + world.answers[1])
    states = world.engine.capture([tokens], LAST)[0][0]
    row = {
        "hidden_states": states[None],
        "input_ids": tokens[None],
        "position_ids": torch.arange(len(tokens))[None],
        "document_ids": torch.zeros(1, len(tokens), dtype=torch.int64),
    }
    replayed = list(model.replay(**row, num_speculative_tokens=depths))
    known = {int(target): draft for draft, target in enumerate(model.draft_to_target.tolist())}
    seen: list[torch.Tensor] = []
    forced: list[int] = []

    def choose(logits, temperature, generator):
        seen.append(logits)
        return torch.tensor([forced[len(seen) - 1]]), None

    monkeypatch.setattr(module, "pick", choose)
    drafter = model.draft()
    state = drafter.begin(tokens[:4], states[:3])
    for anchor in range(2, len(tokens) - depths - 2):
        wanted = tokens[anchor + 2 : anchor + 2 + depths].tolist()
        if all(token in known for token in wanted):
            seen.clear()
            forced[:] = [known[token] for token in wanted]
            drafter.propose(state, num_tokens=depths, temperature=0.0, generator=None)
            for depth, logits in enumerate(seen):
                scale = replayed[depth][anchor].abs().max()
                assert (logits - replayed[depth][anchor]).abs().max() < 1e-5 * scale, (anchor, depth)
        drafter.advance(state, tokens[anchor + 2 : anchor + 3], states[anchor + 1 : anchor + 2])


def check_saved_is_the_same(world, model, folder) -> SpeculatorModel:
    """A saved speculator loads with equal logits at every depth; returns what was loaded."""
    model.save_pretrained(folder)
    loaded = SpeculatorModel.from_pretrained(folder)
    row = row_of(world, 0)
    arguments = {**{key: row[key] for key in REPLAYED}, "num_speculative_tokens": 3}
    for mine, theirs in zip(model.replay(**arguments), loaded.replay(**arguments), strict=True):
        assert torch.equal(mine, theirs)
    return loaded
