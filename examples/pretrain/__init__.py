"""Pretrain a LLaMA or a GPT-2 on any folder of text."""
