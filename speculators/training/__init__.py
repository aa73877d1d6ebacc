"""The training loop and what it needs: world, sharding, optimizer, schedule, checkpoints."""
