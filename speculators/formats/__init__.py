"""Values with which an algorithm's `layouts.py` describes how servers and other projects store its speculators."""
