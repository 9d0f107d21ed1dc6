"""Facts about memory: bytes behind tensors, sizes as people write them, and snapshots of an optimizer."""
