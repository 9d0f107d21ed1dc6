"""Checkpoints without a Trainer: what is in them, and their weights in other formats."""
