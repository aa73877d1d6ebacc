"""Layouts of other programs, which each algorithm describes in its `layouts.py`."""
