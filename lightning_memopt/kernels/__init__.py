"""Kernels for GPUs, written in Triton, of the operations whose time is that of reading gradients and weights."""
