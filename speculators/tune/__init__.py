"""How many tokens to draft per round: costs of rounds, predicted and measured speed-ups, and a schedule over loads."""
