"""Writing files and folders whole, with hashes; locks; the cache folder."""
