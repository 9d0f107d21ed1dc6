"""Supervised fine-tuning on pairs of a Python function's head and its body."""
