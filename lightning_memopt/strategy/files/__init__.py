"""Checkpoint files: written atomically, verified when read, and never trusted."""
