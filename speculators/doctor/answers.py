"""The verifier's own greedy answers to a handful of prompts, with the states of every layer that a check wants."""

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
    """What acceptance is measured on.

    Attributes:
        engine: the verifier.
        head: its final norm and head, over the whole vocabulary.
        rows: answers of two tokens and more, judged at T = 0; their states are left out.
        source: in words, where the prompts come from.
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
        """Lets the verifier answer, and keeps the states of `layer_ids` that it has, and of its last layer.

        Raises:
            DataError: it says nothing: no answer has two tokens of its own.
        """
        head = load_head(engine.folder, engine.facts).to(engine.device)
        ids = sorted({*(layer for layer in layer_ids if 0 <= layer <= engine.num_layers), engine.num_layers})
        found = own_rows(engine, head, prompts, ids, temperature=0.0, max_new_tokens=max_new_tokens, progress=progress)
        rows = [row for row in found if len(row.response.answer) > 1]
        if not rows:
            raise DataError(
                f"{source}: the verifier's answers have less than two tokens: there is nothing to draft",
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
        """The verifier's layers, N."""
        return self.engine.num_layers

    @property
    def tokens(self) -> list[torch.Tensor]:
        """Prompt and answer of each row, [n] int64."""
        return [torch.tensor(row.response.tokens) for row in self.rows]

    def states(self, layer_ids: Sequence[int]) -> list[torch.Tensor]:
        """Returns the states of each row, [n, A*H] in float32, concatenated in the order given.

        Raises:
            VerifierError: the verifier has no such layer.
        """
        if outside := [layer for layer in layer_ids if not 0 <= layer <= self.num_layers]:
            raise VerifierError(f"the verifier has layer ids 0 to {self.num_layers}, and not {outside}")
        if missing := sorted({*layer_ids} - set(self._states)):
            self._capture(missing)
        return [torch.cat([self._states[layer][row] for layer in layer_ids], -1) for row in range(len(self.rows))]

    def normed(self) -> list[torch.Tensor]:
        """Returns the last layer's states behind the final norm, [n, H] each."""
        return [self.head.normalize(state).float() for state in self.states((self.num_layers,))]

    def _capture(self, layer_ids: Sequence[int]) -> None:
        width = self.engine.facts.hidden_size
        found: dict[int, torch.Tensor] = {}
        for index, chosen, _ in self.engine.capture_all(self.tokens, layer_ids):
            found[index] = chosen.float()
        for place, layer in enumerate(layer_ids):
            part = slice(place * width, (place + 1) * width)
            self._states[layer] = [found[index][:, part] for index in range(len(self.rows))]
