"""A run made again from its lock, and verified."""
