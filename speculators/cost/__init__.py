"""What a plan will cost: memory, disk, time."""
