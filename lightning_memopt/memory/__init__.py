"""Memory facts: bytes behind tensors, human-readable sizes, and snapshots of an optimizer."""
