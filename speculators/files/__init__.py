"""Writes files and folders whole, with their hashes; holds locks; knows the cache folder."""
