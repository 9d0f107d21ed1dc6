"""Checkpoints: what Lightning calls, what is saved, and what is checked before anything is loaded."""
