"""The optimizer, its recipes as classes, and the code that measures it."""
