"""Tokenizers for pretraining: a byte-level BPE that is trained on the text, or one that exists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def trained_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `train_tokenizer` made, from its file, as transformers uses and saves it."""
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END_OF_TEXT)


def given_tokenizer(path: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder.

    Args:
        path: A folder that a tokenizer's ``save_pretrained`` wrote.
        vocab_size: How many tokens it must have.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the tokenizer has another number of tokens, or cannot be used.
    """
    folder = Path(path).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"`tokenizer` must be a folder that a tokenizer's save_pretrained wrote, but {str(folder)!r} has no "
            "tokenizer_config.json."
        )
    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not found.is_fast or found.eos_token is None:
        lacks = "`eos_token`, which ends every text" if found.is_fast else "fast version, made with `tokenizers`"
        raise ValueError(f"The tokenizer in {str(folder)!r} has no {lacks}: use another one.")
    if len(found) != vocab_size:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but the tokenizer in {str(folder)!r} has {len(found)} tokens: add "
            f"--data.vocab_size {len(found)} --model.vocab_size {len(found)}."
        )
    # A folder may ask for what is done to the texts of another task.
    found.backend_tokenizer.no_truncation()
    found.backend_tokenizer.no_padding()
    return found
