"""Layouts of blocks over ranks, collectives between ranks, and the modules that FSDP2 shards together."""
