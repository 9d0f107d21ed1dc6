"""The optimizer, its recipes as classes, and what reads it."""
