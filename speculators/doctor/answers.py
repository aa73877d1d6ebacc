"""The verifier's greedy answers to a handful of prompts, with hidden states of every layer that a check asks for."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from speculators.bench.responses import own_rows
from speculators.bench.rows import JudgedResponse
from speculators.bench.suites import Prompt
from speculators.errors import DataError, VerifierError
from speculators.events import Progress, ignore
from speculators.verifier.engine import Engine
from speculators.verifier.weights import VerifierHead, load_head


@attrs.define(eq=False, kw_only=True)
class Answers:
    """The answers on which acceptance is measured.

    Attributes:
        engine: runs the verifier.
        head: the verifier's final norm and head, over the whole vocabulary.
        rows: answers of at least two tokens, judged at T = 0, without their states.
        source: describes where the prompts come from.
    """

    engine: Engine
    head: VerifierHead
    rows: tuple[JudgedResponse, ...]
    source: str
    _states: dict[int, list[torch.Tensor]] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls,
        engine: Engine,
        prompts: Sequence[Prompt],
        layer_ids: Sequence[int],
        *,
        max_new_tokens: int,
        source: str,
        progress: Progress = ignore,
    ) -> Answers:
        """Generates the answers and keeps the states of `layer_ids` (those that exist) and of the last layer.

        Raises:
            DataError: no answer has two tokens.
        """
        head = load_head(engine.folder, engine.facts).to(engine.device)
        ids = sorted({*(layer for layer in layer_ids if 0 <= layer <= engine.num_layers), engine.num_layers})
        answered = own_rows(
            engine, head, prompts, ids, temperature=0.0, max_new_tokens=max_new_tokens, progress=progress
        )
        rows = [row for row in answered if len(row.response.answer) > 1]
        if not rows:
            raise DataError(
                f"{source}: every answer of the verifier has fewer than two tokens, so there is nothing to draft",
                hint="give prompts that it answers at length (--prompts FILE)",
            )
        width = engine.facts.hidden_size
        states = {
            layer: [row.hidden_states[:, place * width : (place + 1) * width].float() for row in rows]
            for place, layer in enumerate(ids)
        }
        bare = tuple(attrs.evolve(row, hidden_states=row.hidden_states[:, :0]) for row in rows)
        return cls(engine=engine, head=head, rows=bare, source=source, states=states)

    @property
    def num_layers(self) -> int:
        """Number of the verifier's layers (N)."""
        return self.engine.num_layers

    @property
    def tokens(self) -> list[torch.Tensor]:
        """Token ids of prompt and answer, [n] int64 per row."""
        return [torch.tensor(row.response.tokens) for row in self.rows]

    def states(self, layer_ids: Sequence[int], count: int | None = None) -> list[torch.Tensor]:
        """Gives the states of each of the first `count` rows, [n, A*H] in float32, in the order of `layer_ids`.

        Raises:
            VerifierError: the verifier has no such layer.
        """
        if outside := [layer for layer in layer_ids if not 0 <= layer <= self.num_layers]:
            raise VerifierError(f"the verifier has layer ids 0 to {self.num_layers}, not {outside}")
        if missing := sorted({*layer_ids} - set(self._states)):
            self._capture(missing)
        rows = range(len(self.rows[:count]))
        return [torch.cat([self._states[layer][row] for layer in layer_ids], -1) for row in rows]

    def normed(self) -> list[torch.Tensor]:
        """Gives each row's last-layer states after the final norm, [n, H]."""
        return [self.head.normalize(state).float() for state in self.states((self.num_layers,))]

    def _capture(self, layer_ids: Sequence[int]) -> None:
        width = self.engine.facts.hidden_size
        by_row: dict[int, torch.Tensor] = {}
        for index, chosen, _ in self.engine.capture_all(self.tokens, layer_ids):
            by_row[index] = chosen.float()
        for place, layer in enumerate(layer_ids):
            part = slice(place * width, (place + 1) * width)
            self._states[layer] = [by_row[index][:, part] for index in range(len(self.rows))]
