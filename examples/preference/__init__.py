"""Train a language model on preferences (DPO) and on a reward that a program verifies (ReMax)."""
