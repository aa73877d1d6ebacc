"""One folder per algorithm, and what several of them share."""
