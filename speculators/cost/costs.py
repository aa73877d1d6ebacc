"""The costs of a plan: memory per process, disk, operations, communication; arithmetic on counts from elsewhere."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.data.streamed import WINDOW
from speculators.recipe.input_sections import FP8
from speculators.recipe.plan import Plan

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
# `spec plan` knows the number of GPUs but not of machines, and assumes this many GPUs in each.
GPUS_PER_NODE = 8
# Cached states of this many bytes are worth a warning.
MUCH_DISK = 100e9


@attrs.frozen(kw_only=True)
class RowCost:
    """The needs of one update on one packed row, in bytes and floating-point operations.

    Attributes:
        trainable, frozen: parameters.
        trainable_bytes, frozen_bytes: of the model itself; frozen tensors keep the dtype of the verifier's file.
        head_bytes: the verifier's final norm and head rows, from which targets are computed; 0 if they are not used.
        optimizer_bytes: the whole state of the optimizer, the average of the weights included.
        momentum_bytes: the part of that state which every process keeps whole, sharded or not: muon's.
        activation_bytes: the most that lives at once, without gradients of parameters and chunk buffers.
        chunk_bytes: logits and everything computed from them, for one chunk of positions of the device's type.
        row_flops: products of forward and backward, attention included.
        update_flops: products of the optimizer, which every process repeats.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    head_bytes: int
    optimizer_bytes: int
    momentum_bytes: int
    activation_bytes: int
    chunk_bytes: int
    row_flops: int
    update_flops: int


@attrs.frozen(kw_only=True)
class VerifierCost:
    """The size and work of the verifier.

    Attributes:
        parameters: all of them.
        layer_parameters: those of the decoder layers.
        products: elements of the layers' matrices that one token is multiplied with, routed experts only.
        attention: floating-point operations per token and key.
    """

    parameters: int
    layer_parameters: int
    products: int
    attention: int

    def flops(self, mean_tokens: float) -> float:
        """Counts operations per token in documents of this mean length, without the head, which capture leaves out."""
        # A multiplication and an addition per element; a causal token sees half of the document on average.
        return 2 * self.products + self.attention * mean_tokens / 2


@attrs.frozen(kw_only=True)
class Amount:
    """The amount of data and of training.

    Attributes:
        conversations, tokens: of one epoch; None while unknown.
        supervised: share of the tokens that a loss is computed on.
        updates, trained: optimizer updates and tokens of the whole run; None while unknown.
        counted: whether the figures were counted on prepared data; otherwise they are upper bounds.
    """

    conversations: int | None
    tokens: int | None
    supervised: float
    updates: int | None
    trained: int | None
    counted: bool


@attrs.frozen(kw_only=True)
class Costs:
    """A plan with the needs of its parts.

    Attributes:
        mean_tokens: of a conversation.
        state_bytes: of one token's cached states on disk.
    """

    plan: Plan
    row: RowCost
    verifier: VerifierCost
    amount: Amount
    mean_tokens: int
    state_bytes: int

    @property
    def cached(self) -> bool:
        """Whether training reads stored states."""
        return self.plan.recipe.data.stored

    @property
    def captures(self) -> bool:
        """Whether states are captured to disk first, by this process or a server."""
        return self.cached and self.plan.recipe.data.store is None

    @property
    def online(self) -> bool:
        """Whether the processes that train compute the states meanwhile."""
        return self.plan.recipe.data.online

    def window_bytes(self, world_size: int) -> int:
        """Counts the bytes of streamed states that one process has received or awaits; 0 for all others."""
        data = self.plan.recipe.data
        if not data.served or data.stored:
            return 0
        return WINDOW * data.server.requests_at_once(world_size) * self.mean_tokens * self.state_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed row's states, as a forward takes them."""
        widths = (len(self.plan.target_layer_ids) + 1) * self.plan.facts.hidden_size
        return self.plan.row_tokens * widths * COMPUTE_BYTES[self.plan.precision]

    def shards(self, world_size: int) -> int:
        """Counts the processes over which one copy of the model is sharded."""
        over = self.plan.recipe.distributed.shard
        return 1 if not over else min(world_size, GPUS_PER_NODE) if over == "node" else world_size

    def memory(self, world_size: int, *, capture_tokens: int, rows_on_host: bool) -> dict[str, int]:
        """Counts the bytes of one process while it trains, by part.

        Sharded weights are gathered once per update and gradients reduced once (training/shard.py), so that for most
        of an update both exist whole, beside the shards.

        Args:
            world_size: processes.
            capture_tokens: of one forward of the verifier, if it runs beside training.
            rows_on_host: whether rows that were not computed here wait in the host's memory, so that only two are on
                the device; rows stored in 8 bits wait on the device all the same, where they are decoded.
        """
        row, recipe, shards = self.row, self.plan.recipe, self.shards(world_size)
        shard = row.trainable_bytes // shards if shards > 1 else 0
        on_host = rows_on_host and not self.online and not (self.cached and recipe.data.states_dtype == FP8)
        waiting = 2 if on_host else 2 * -(-self.plan.rows_per_step // world_size)
        window = 0 if rows_on_host else self.window_bytes(world_size)
        beside = self.verifier_memory(recipe.data.capture_dtype, capture_tokens, world_size) if self.online else 0
        return {
            "weights": row.trainable_bytes + row.frozen_bytes + shard,
            "gradients": row.trainable_bytes + shard,
            "optimizer": row.momentum_bytes + (row.optimizer_bytes - row.momentum_bytes) // shards,
            "activations": row.activation_bytes,
            "chunk buffers": row.chunk_bytes,
            "verifier": row.head_bytes + beside,
            "rows": waiting * self.row_bytes + window,
        }

    def verifier_memory(self, dtype: str, tokens: int, world_size: int) -> int:
        """Counts the bytes of the verifier and one forward of it; the latter by a formula, never measured on a GPU.

        These exist at once: the captured states (twice while they are joined), the residual stream, its norm, queries,
        keys and values (about four more), and three buffers of the feed-forward.

        Args:
            dtype: of weights and states.
            tokens: of the forward.
            world_size: processes, which hold one copy together if the recipe says so: each has a part of every layer,
                and whole the layer that runs, the next one and everything besides layers.
        """
        facts, whole = self.plan.facts, self.verifier.parameters
        kept, inner = len(self.plan.target_layer_ids), facts.get("intermediate_size") or 4 * facts.hidden_size
        if world_size > 1 and self.plan.recipe.distributed.shard_verifier:
            layers = self.verifier.layer_parameters
            whole = -(-whole // world_size) + whole - layers + 2 * layers // facts.num_hidden_layers
        forward = tokens * ((2 * kept + 5) * facts.hidden_size + 3 * inner)
        return (whole + forward) * ITEM_BYTES[dtype]

    def disk(self) -> dict[str, int | None]:
        """Counts the bytes on disk by kind of file; None where the data is not known.

        A run ends with its latest checkpoints, the last of which is mostly the best. There are at most two more: the
        best, if it is older, and one that is being written before another is removed.
        """
        row, facts, keep = self.row, self.plan.facts, self.plan.recipe.schedule.keep_checkpoints
        checkpoint = row.trainable_bytes + row.optimizer_bytes
        kept = str(facts.get("dtype") or facts.get("torch_dtype") or "float32")
        states = 0 if not self.captures else self.states_bytes
        return {
            "verifier": self.verifier.parameters * ITEM_BYTES.get(kept, 4),
            "hidden states": states,
            "checkpoints": keep * checkpoint,
            "checkpoints, at most": (keep + 2) * checkpoint,
            "speculator": row.trainable_bytes + row.frozen_bytes,
        }

    @property
    def states_bytes(self) -> int | None:
        """Bytes that cached states take, or would take; None while the data is unknown."""
        return None if self.amount.tokens is None else self.amount.tokens * self.state_bytes

    def flops(self, world_size: int = 1) -> dict[str, float | None]:
        """Counts the operations of one process by stage; None where the data is not known.

        One process writes all answers, whatever the launch; every process updates the optimizer.
        """
        amount, recipe = self.amount, self.plan.recipe
        read = self.verifier.flops(self.mean_tokens)
        stages: dict[str, float | None] = {}
        if recipe.data.regenerate is not None:
            head = 2 * self.plan.facts.vocab_size * self.plan.facts.hidden_size
            stages["prepare"] = None if amount.tokens is None else amount.tokens * (read + head)
        # A server captures on devices that are unknown to this process.
        if self.captures and not recipe.data.served:
            stages["capture"] = None if amount.tokens is None else amount.tokens * read / world_size
        if amount.trained is None or amount.updates is None:
            stages["train"] = None
        else:
            online = read if self.online else 0
            per_token = self.row.row_flops / self.plan.row_tokens + online
            stages["train"] = amount.trained * per_token / world_size + amount.updates * self.row.update_flops
        return stages

    def tokens(self) -> dict[str, int | None]:
        """Counts the tokens that each stage works on."""
        stages = {"prepare": self.amount.tokens}
        if self.captures:
            stages["capture"] = self.amount.tokens
        return {**stages, "train": self.amount.trained}

    def communication(self, world_size: int) -> dict[str, int]:
        """Counts the bytes that one process receives in one update, with ring algorithms.

        Among shards, float32 weights are gathered, gradients are reduced and scattered, and muon gathers its matrices'
        gradients. Between copies, the gradients of a shard are all-reduced, which costs a reduction and a gathering.
        """
        shards, whole = self.shards(world_size), self.row.trainable_bytes
        copies = world_size / shards
        others, elsewhere = (shards - 1) / shards, (copies - 1) / copies
        gradients = whole // 2 if self.plan.recipe.schedule.gradient_precision == "bf16" else whole
        moved = {
            "weights": whole * others,
            "gradients": gradients * others + 2 * gradients / shards * elsewhere,
            "optimizer": self.row.momentum_bytes * others,
        }
        return {name: round(size) for name, size in moved.items() if size}

    def reading(self, tokens: int) -> int:
        """Counts the bytes of cached states that are read for so many tokens; 0 online."""
        return tokens * self.state_bytes if self.cached else 0

    def to_dict(self) -> dict[str, Any]:
        """Turns the costs that do not depend on a device into JSON values."""
        return {
            "amount": attrs.asdict(self.amount),
            "row": attrs.asdict(self.row),
            "verifier": attrs.asdict(self.verifier),
            "mean_tokens": self.mean_tokens,
            "disk": self.disk(),
            "tokens": self.tokens(),
            "flops": self.flops(),
        }
