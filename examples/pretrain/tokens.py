"""Tokens of texts in files that are mapped into memory, so that all processes of a machine share them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from examples.pretrain.copies import without_copies
from examples.pretrain.texts import Texts
from examples.pretrain.vocabulary import END_OF_TEXT, train_tokenizer

TEXTS_AT_A_TIME = 256
VERSION = 2  # of the cache: the same texts made other tokens before


class Tokens(Dataset[Tensor]):
    """Sequences of tokens, read from a file where they are needed.

    Args:
        path: A file of tokens without a header.
        dtype: Of the numbers in the file.
        seq_len: Tokens per sequence. What is left at the end of the file is not used.
    """

    def __init__(self, path: Path, dtype: str, seq_len: int) -> None:
        tokens = np.memmap(path, dtype=dtype, mode="r")
        self.count = len(tokens)
        self._sequences = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int | slice) -> Tensor:
        """Return tokens ``[seq_len]``, or ``[sequences, seq_len]`` for a slice."""
        return torch.from_numpy(self._sequences[index].astype(np.int64))


def cached(
    texts: Texts, vocab_size: int, cache_dir: Path, given: PreTrainedTokenizerFast | None = None
) -> tuple[Path, bool]:
    """Return the folder with the tokens of texts and the trained vocabulary, and whether it was there before.

    Validation texts that repeat training texts are left out. The folder's name is made from the files and the settings.
    It appears when it is complete.

    Args:
        texts: The files.
        vocab_size: Size of the vocabulary to train.
        cache_dir: Where the folder is.
        given: A tokenizer to use instead of training one.
    """
    vocabulary = vocab_size if given is None else (given.backend_tokenizer.to_str(), given.eos_token)
    settings = (VERSION, texts.fingerprint, vocabulary, tokenizers.__version__)
    folder = cache_dir / f"tokens-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder, True
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache_dir, prefix="unfinished-"))
    try:
        if given is None:
            tokenizer, end = train_tokenizer(texts.read("train"), vocab_size), END_OF_TEXT
            tokenizer.save(str(temporary / "tokenizer.json"))
        else:
            tokenizer, end = given.backend_tokenizer, given.eos_token
        dtype = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"
        (temporary / "tokens.json").write_text(json.dumps({"dtype": dtype}))
        held_out = without_copies(texts.read("val"), texts.read("train"))
        for split, chosen in (("train", texts.read("train")), ("val", held_out)):
            write(encode(tokenizer, chosen, end), temporary / f"{split}.bin", dtype)
        if not (temporary / "val.bin").stat().st_size:
            rank_zero_warn(
                f"Every validation file of {texts.root} repeats training files, so the validation loss says little "
                "about other text. Add files of another kind, or another `root`."
            )
            write(encode(tokenizer, texts.read("val"), end), temporary / "val.bin", dtype)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was quicker
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, False


def write(tokens: Iterable[list[int]], path: Path, dtype: str) -> None:
    """Write tokens to a file without a header."""
    with path.open("wb") as file:
        for ids in tokens:
            file.write(np.array(ids, dtype).tobytes())


def load(folder: Path, seq_len: int) -> dict[str, Tokens]:
    """Return the sequences of ``"train"`` and ``"val"`` in a folder that `cached` made."""
    facts: dict[str, Any] = json.loads((folder / "tokens.json").read_text())
    return {split: Tokens(folder / f"{split}.bin", facts["dtype"], seq_len) for split in ("train", "val")}


def encode(tokenizer: tokenizers.Tokenizer, texts: Iterator[str], end: str) -> Iterator[list[int]]:
    """Yield the tokens of every text, and the one that ends it, without other special tokens."""
    last = tokenizer.token_to_id(end)
    while some := list(islice(texts, TEXTS_AT_A_TIME)):
        for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
            yield [*encoding.ids, last]
