"""The model before training: sharded, on its device, the same on all ranks, in the right precision."""
