"""Shows what a run would train on, for `spec data`: masks, lengths, leaks, how on-policy the answers are."""
