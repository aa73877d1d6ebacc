"""What a plan will cost: memory, disk, operations, time."""
