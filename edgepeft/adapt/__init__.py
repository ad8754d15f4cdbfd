"""Adapters: the table of methods, the files they are kept in, and merging them into the weights."""
