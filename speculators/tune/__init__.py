"""Chooses how many tokens to draft per round: costs of rounds, predicted and measured speed-ups, schedules by load."""
