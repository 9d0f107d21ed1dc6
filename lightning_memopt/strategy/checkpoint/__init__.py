"""Save, check and load checkpoints."""
