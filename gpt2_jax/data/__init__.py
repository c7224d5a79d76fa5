"""Tokens: where they come from, how they are stored, in which order they are read."""
