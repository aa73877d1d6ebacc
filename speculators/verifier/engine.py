"""Runs the verifier in this process: hidden states for training, continuations for data."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from speculators.chunks import CHUNKS
from speculators.errors import VerifierError
from speculators.events import Progress, ignore
from speculators.facts import VerifierFacts, reason
from speculators.nn.precision import compute_dtype
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.architecture import auto_class, config_of, decoder_layers
from speculators.verifier.capture import (
    Capture,
    batches_by_length,
    batches_in_order,
    takes_positions,
)
from speculators.verifier.factors import by_factors, factors_for
from speculators.verifier.generate import Sampling, generate_batches
from speculators.verifier.head import VerifierHead
from speculators.verifier.quiet import quiet
from speculators.verifier.sharded import InStep, loaded_in_parts
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
        group: the processes that hold one copy together, each a part of every decoder layer; all make the engine, and
            then compute in `together`. None for a whole copy in this process.

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_folder(folder)
        trusted = section is not None and section.trust_remote_code
        if trusted:
            trust(folder)
        self.folder = folder
        self.facts = VerifierFacts.read(folder / "config.json")
        self.device = torch.device(device)
        self.dtype = compute_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype, self.device)
        parts = {} if group is None else loaded_in_parts(self.facts, dist.get_world_size(group))
        self.model = _load(folder, self.facts, self.dtype, trusted, parts).to(self.device)
        self._in_step = None if group is None else InStep(self.model, group)
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

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the model."""
        return self._in_step is not None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Lets each process run as many forwards as it needs in the block, which all processes enter."""
        yield
        if self._in_step is not None:
            self._in_step.follow()

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
        return list(map(_side_by_side, self._streams(batch, (*layer_ids, self.num_layers), longest)))

    def capture_layers(
        self, batch: Sequence[torch.Tensor], layer_ids: Sequence[int], *, longest: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Captures only the chosen states of each sequence, [n, A*H]."""
        if not layer_ids:
            raise VerifierError("no layers to capture")
        return [torch.cat(states, -1) for states in self._streams(batch, tuple(layer_ids), longest)]

    def _streams(
        self,
        batch: Sequence[torch.Tensor],
        ids: tuple[int, ...],
        longest: Sequence[int] | None = None,
        *,
        packed: bool = False,
    ) -> list[list[torch.Tensor]]:
        """Captures the streams [n, H] of each sequence at `ids`, with the rotary embedding of its own length.

        Args:
            packed: put the sequences side by side into one row, instead of padding them.
        """
        self._check_sequences(batch)
        reached = [len(sequence) for sequence in batch] if longest is None else longest
        streams: list[list[torch.Tensor]] = [[] for _ in batch]
        for group in by_factors(reached, self.model):
            with factors_for(self.model, max(reached[index] for index in group)):
                capture, sequences = Capture(self.model, self._layers, ids), [batch[index] for index in group]
                lengths = [len(each) for each in sequences]
                if packed and len(group) > 1:
                    joined = capture.run(*self._packed(sequences))
                    split = [stream[0].split(lengths) for stream in joined]
                    states = list(map(list, zip(*split, strict=True)))
                else:
                    padded = capture.run(self._padded(sequences))
                    states = [[stream[row, :length] for stream in padded] for row, length in enumerate(lengths)]
            for index, parts in zip(group, states, strict=True):
                streams[index] = parts
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

    def capture_packed(
        self, rows: Sequence[torch.Tensor], layer_ids: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Captures sequences of different lengths without padding, as `capture_all` captures similar ones.

        They lie side by side in one row, in which positions restart with each sequence. Batches are padded where the
        model does not keep such sequences apart.
        """
        chunks = CHUNKS[self.device.type]
        if not self.keeps_apart:
            yield from self.capture_all(rows, layer_ids, batch_tokens=chunks.capture_tokens)
            return
        for indices in batches_in_order([len(row) for row in rows], chunks.packed_tokens):
            captured = self._streams([rows[i] for i in indices], (*layer_ids, self.num_layers), packed=True)
            for index, states in zip(indices, captured, strict=True):
                yield index, *_side_by_side(states)

    @cached_property
    def keeps_apart(self) -> bool:
        """Whether sequences side by side in one row do not see each other; tried on a few tokens.

        transformers masks where positions restart, but running states (linear attention, Mamba) pass on, and a model
        that does not hand its positions to the mask (gpt-oss) attends across. Chunks of attention are cut by place in
        the row in earlier versions of transformers, and no short trial can show that.
        """
        if not takes_positions(self.model) or self.facts.get("attention_chunk_size") is not None:
            return False
        pairs = [pair % self.facts.vocab_size for pair in torch.arange(16).split(2)]
        packed = torch.cat([states[0] for states in self._streams(pairs, (self.num_layers,), packed=True)[1:]])
        alone = torch.cat([self._streams([pair], (self.num_layers,))[0][0] for pair in pairs[1:]])
        # Of each token, since single ones are larger than others by a thousand; and the median, because in 16 bits a
        # token may go to another expert. Rounding is far below a tenth, and what is seen of others is about 1. A
        # padding token may have a state of zeros, and 0 / 0 does not count.
        return bool(((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).nanmedian() < 0.1)

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
        token_filter: TokenFilter = ALL_TOKENS,
        seed: int = 0,
        batch_size: int = 32,
        progress: Progress = ignore,
    ) -> list[list[int]]:
        """Continues prompts; returns the new tokens of each, including the one that ended it.

        Args:
            prompts: token ids.
            max_new_tokens: for each prompt.
            temperature: 0 is greedy; above, the pure distribution at that temperature, of the tokens of `token_filter`.
            token_filter: tokens that may be sampled.
            seed: of the sampling. The order of the prompts does not matter.
            batch_size: prompts at once, of similar length.
            progress: receives the answered prompts, and tokens per second in the note.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            token_filter=token_filter,
            seed=seed,
            batch_size=batch_size,
        )
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

    def _packed(self, batch: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts sequences into one row [1, S], with their positions."""
        ids, positions = torch.cat([s.long() for s in batch]), torch.cat([torch.arange(len(s)) for s in batch])
        return ids[None].to(self.device), positions[None].to(self.device)

    def _padded(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        # On the right, and any id will do: attention is causal, so no real token ever sees it, nor is it moved.
        padded = torch.nn.utils.rnn.pad_sequence([s.long() for s in batch], batch_first=True)
        return padded.to(self.device)


def _side_by_side(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins all streams but the last one, which stays apart."""
    return torch.cat(states[:-1], -1) if len(states) > 1 else states[-1][:, :0], states[-1]


def _load(
    folder: Path, facts: VerifierFacts, dtype: torch.dtype, trust_remote_code: bool, parts: dict[str, Any]
) -> Any:
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
                **parts,
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
