"""FSDP2 and compressed optimizer state in a loop of one's own, with Fabric."""
