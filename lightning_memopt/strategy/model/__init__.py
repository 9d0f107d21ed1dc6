"""Prepare a model for training: initialize, synchronize, shard, and set its device and precision."""
