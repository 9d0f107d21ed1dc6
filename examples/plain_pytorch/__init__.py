"""FSDP2 and compressed optimizer state in a loop of plain PyTorch."""
