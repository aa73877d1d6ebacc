"""Acceptance in this process: suites, exact replay, live decoding, statistics."""
