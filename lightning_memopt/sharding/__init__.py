"""What lies on which rank: layouts of blocks, collectives between ranks, and the modules that FSDP2 shards together."""
