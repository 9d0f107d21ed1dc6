"""Move a run of AdamW to compressed optimizer state in the middle."""
