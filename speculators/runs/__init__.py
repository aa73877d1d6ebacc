"""The contents of run folders and of the cache, as typed values, and where everything lies."""
