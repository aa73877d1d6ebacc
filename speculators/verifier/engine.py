"""Runs the verifier in this process: hidden states for training, continuations for data."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from speculators.errors import VerifierError
from speculators.events import Progress, ignore
from speculators.facts import VerifierFacts, reason
from speculators.nn.precision import compute_dtype
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.architecture import auto_class, config_of, decoder_layers
from speculators.verifier.capture import Capture, batches_by_length
from speculators.verifier.factors import by_factors, factors_for
from speculators.verifier.generate import Sampling, generate_batches
from speculators.verifier.head import VerifierHead
from speculators.verifier.quiet import quiet
from speculators.verifier.sources import check_folder
from speculators.verifier.tokens import load_tokenizer, stop_ids
from speculators.verifier.trust import trust


class Engine:
    """A transformers model in eval mode, its tokenizer and its facts.

    Args:
        folder: a Hugging Face folder, from `obtain`.
        dtype: of weights and states, or its name ("float32", "bfloat16", "float16"). bfloat16 becomes float32 on a
            device without bf16 products.
        device: where the model is.
        section: the recipe's `[verifier]`: whether the model may bring code, and its chat template; None for the
            folder as it is.

    Raises:
        VerifierError: the model cannot be loaded, or a tensor is missing from its files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        section: VerifierSection | None = None,
    ) -> None:
        check_folder(folder)
        trusted = section is not None and section.trust_remote_code
        if trusted:
            trust(folder)
        self.folder = folder
        self.facts = VerifierFacts.read(folder / "config.json")
        self.device = torch.device(device)
        self.dtype = compute_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype, self.device)
        self.model = _load(folder, self.facts, self.dtype, trusted).to(self.device)
        self._layers = decoder_layers(self.model)
        self._section = section
        self._tokenizer: Any = None

    @property
    def num_layers(self) -> int:
        """The decoder layers, N; id N is the last layer's output before the final norm."""
        return len(self._layers)

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, loaded on first use: capture works on ids and needs none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder, self._section)
        return self._tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return stop_ids(self.tokenizer, self.model.generation_config)

    def capture(
        self, batch: Sequence[torch.Tensor], layer_ids: Sequence[int], *, longest: Sequence[int] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Captures residual streams of sequences, without computing logits.

        Args:
            batch: sequences of token ids, each [n] int64, of any lengths.
            layer_ids: id l is the stream entering layer l, id N the last layer's output before the final norm.
            longest: the length that each sequence could have reached, which decides longrope's factors; None for its
                own.

        Returns:
            For each sequence the chosen states, concatenated in that order [n, A*H], and the last layer's output
            before the final norm [n, H]; in the engine's dtype, on its device.

        Raises:
            VerifierError: a layer id is not in 0..N, or a sequence is empty.
        """
        captured = self._streams(batch, (*layer_ids, self.num_layers), longest)
        return [(torch.cat(states[:-1], -1) if layer_ids else states[-1][:, :0], states[-1]) for states in captured]

    def capture_layers(
        self, batch: Sequence[torch.Tensor], layer_ids: Sequence[int], *, longest: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Captures only the chosen states of each sequence, [n, A*H]; stops after the last layer that they need."""
        if not layer_ids:
            raise VerifierError("no layers to capture")
        return [torch.cat(states, -1) for states in self._streams(batch, tuple(layer_ids), longest)]

    def _streams(
        self, batch: Sequence[torch.Tensor], ids: tuple[int, ...], longest: Sequence[int] | None
    ) -> list[list[torch.Tensor]]:
        """Captures the streams [n, H] of each sequence at `ids`, with the rotary embedding of its own length."""
        self._check_sequences(batch)
        lengths = [len(sequence) for sequence in batch] if longest is None else longest
        streams: list[list[torch.Tensor]] = [[] for _ in batch]
        for group in by_factors(lengths, self.model):
            with factors_for(self.model, max(lengths[index] for index in group)):
                states = Capture(self.model, self._layers, ids).run(self._padded([batch[index] for index in group]))
            for row, index in enumerate(group):
                streams[index] = [state[row, : len(batch[index])] for state in states]
        return streams

    def capture_all(
        self,
        rows: Sequence[torch.Tensor],
        layer_ids: Sequence[int],
        *,
        batch_tokens: int = 4096,
        longest: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Captures many sequences in batches of similar length.

        Args:
            rows: sequences of token ids, each [n] int64.
            layer_ids, longest: as in `capture`.
            batch_tokens: of one batch, padding included; a longer sequence is a batch by itself.

        Yields:
            (index in `rows`, chosen states [n, A*H], last states [n, H]), shortest rows first.
        """
        for indices in batches_by_length([len(row) for row in rows], batch_tokens):
            lengths = None if longest is None else [longest[index] for index in indices]
            captured = self.capture([rows[index] for index in indices], layer_ids, longest=lengths)
            for index, (chosen, last) in zip(indices, captured, strict=True):
                yield index, chosen, last

    def check_head(self, head: VerifierHead, rows: torch.Tensor | None = None) -> None:
        """Compares `head` with the model's own logits on a few tokens, to catch a misread formula.

        Args:
            head: from `load_head`.
            rows: [R] int64, the target ids of its rows; None if it has all.

        Raises:
            VerifierError: the logits differ by more than rounding.
        """
        ids = torch.arange(16, device=self.device) % self.facts.vocab_size
        with torch.no_grad():
            own = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        expected = own if rows is None else own[:, rows]
        difference = (head.logits(self.capture([ids], ())[0][1]) - expected).abs().max()
        # Relative to the largest logit: in float32 only the sums over H round, in 16 bits all inputs do.
        allowed = (1e-4 if self.dtype == head.weight.dtype == torch.float32 else 5e-2) * own.abs().max()
        if difference > allowed:
            raise VerifierError(
                f"{self.folder}: logits from its final norm and head differ from the model's own by {difference:.3g}",
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Progress = ignore,
    ) -> list[list[int]]:
        """Continues prompts; returns the new tokens of each, including the one that ended it.

        Args:
            prompts: token ids.
            max_new_tokens: for each prompt.
            temperature: 0 is greedy; above, the pure distribution at that temperature (no top-k, no top-p).
            seed: of the sampling. The order of the prompts does not matter.
            batch_size: prompts at once, of similar length.
            progress: receives the answered prompts, and tokens per second in the note.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size)
        for indices, outputs in self.generate_batches(prompts, sampling, progress=progress):
            for index, output in zip(indices, outputs, strict=True):
                answers[index] = output
        return answers

    def generate_batches(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        done: Container[int] = (),
        progress: Progress = ignore,
    ) -> Iterator[tuple[tuple[int, ...], list[list[int]]]]:
        """Continues prompts batch by batch, so that the caller can save finished answers.

        Batches do not depend on `done`: a resumed run gives the same answers as one that was never interrupted.

        Args:
            prompts: token ids.
            sampling: lengths, temperature, seed, batch size.
            done: indices that need no answer; a batch is skipped only if all of it is done.
            progress: as in `generate`.

        Yields:
            (indices in `prompts`, their new tokens).
        """
        return generate_batches(self.model, prompts, sampling, self.stop_ids, done=done, progress=progress)

    @staticmethod
    def _check_sequences(batch: Sequence[torch.Tensor]) -> None:
        if not batch or not all(len(sequence) for sequence in batch):
            raise VerifierError("cannot capture an empty sequence")

    def _padded(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        # On the right, and any id will do: attention is causal, so no real token ever sees it, nor is it moved.
        padded = torch.nn.utils.rnn.pad_sequence([s.long() for s in batch], batch_first=True)
        return padded.to(self.device)


def _load(folder: Path, facts: VerifierFacts, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    config = config_of(facts)
    try:
        with quiet():
            model, loading = auto_class(config).from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except SafetensorError as error:
        message = f"{folder}: a weights file (*.safetensors) is truncated or damaged: {error}"
        raise VerifierError(message, hint="download the model again") from error
    # transformers raises different errors in different versions; all of them concern this folder.
    except Exception as error:
        raise VerifierError(f"{folder}: transformers cannot load the verifier: {reason(error)}") from error
    # transformers initialises missing tensors at random and only warns.
    if missing := sorted(loading["missing_keys"]):
        raise VerifierError(f"{folder}: the verifier's files lack the tensors {', '.join(missing[:5])}")
    return model.eval().requires_grad_(False)
