"""A tiny random verifier with a real tokenizer: for the `smoke` recipe and the tests, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from speculators.verifier.quiet import quiet

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, TURN_START, TURN_END = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Byte pairs that are frequent in English, each made of pieces that stand before it ("Ġ" is the space).
_MERGES = (
    "Ġ t|h e|Ġ a|i n|Ġt he|o n|r e|e r|Ġ s|a t|Ġ o|n d|Ġ w|Ġ c|o r|e n|Ġ b|Ġ f|e s|Ġ p|in g|a n|i s|i t|e d|o u|a l|"
    "Ġo f|Ġa nd|Ġ m|Ġt o|Ġ in|a r|Ġ h|Ġ d|l e|r o|s t|Ġ is|l l|u s|a s|er e|o m|v e|Ġ l|Ġb e|Ġ re|u n"
)


def make_tiny_verifier(
    folder: Path,
    *,
    vocab_size: int = 320,
    tie: bool = True,
    seed: int = 0,
    model_type: str = "llama",
    **config_overrides: Any,
) -> Path:
    """Writes a random causal language model as a Hugging Face folder.

    The same arguments give the same weights. The tokenizer is a byte-level one with the ChatML template; it needs 259
    ids, and is left out of folders with a smaller vocabulary, which serve tests that work on ids alone.

    Args:
        folder: made if it does not exist.
        vocab_size: rows of the embedding; ids beyond the tokenizer's are never produced by text.
        tie: whether the head is the embedding.
        seed: of the random weights.
        model_type: transformers' name of the architecture ("llama", "qwen3", "gemma2", ...).
        config_overrides: keys of config.json that replace the tiny ones.

    Returns:
        `folder`.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        # Wide enough that greedy continuations wander instead of repeating one token.
        "initializer_range": 0.3,
        "bos_token_id": TURN_START,
        "eos_token_id": TURN_END,
        "pad_token_id": TURN_END,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=TURN_START, eos_token_id=TURN_END, pad_token_id=TURN_END, do_sample=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    if vocab_size >= len(SPECIAL_TOKENS) + 256:
        make_byte_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def make_byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with the ChatML template, of at most `vocab_size` ids (at least 259)."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for pair in _MERGES.split("|")[: vocab_size - len(pieces)]:
        left, right = pair.split(" ")
        merges.append((left, right))
        pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    start, end = SPECIAL_TOKENS[TURN_START], SPECIAL_TOKENS[TURN_END]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end)
    fast.chat_template = CHAT_TEMPLATE
    return fast
