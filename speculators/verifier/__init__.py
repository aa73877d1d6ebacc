"""The frozen model: obtaining it, its weights, tokenizer, hidden states and continuations in this process."""
