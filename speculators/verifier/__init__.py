"""Obtains the verifier and runs it in this process: weights, tokenizer, hidden states, continuations."""
