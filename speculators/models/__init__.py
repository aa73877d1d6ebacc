"""One folder an algorithm."""
