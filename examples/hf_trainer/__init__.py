"""Compressed optimizer state in the Trainer of transformers."""
