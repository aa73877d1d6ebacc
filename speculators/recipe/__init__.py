"""The recipe format and its meaning: load, plan, lock."""
