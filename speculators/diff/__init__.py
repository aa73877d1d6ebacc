"""What changed between two recipes or runs, what that invalidates, and whether results are comparable."""
