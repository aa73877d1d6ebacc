"""Strict typed values from TOML and JSON: no coercion, every fault reported at once with its place."""
