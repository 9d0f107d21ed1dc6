"""Kinds of momentum and of second moments: pure math on the local tensors of one block."""
