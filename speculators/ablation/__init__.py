"""One base recipe, its variants, several seeds: the runs, and the differences with their intervals."""
