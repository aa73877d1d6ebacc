"""What is wrong with a speculator, measured."""
