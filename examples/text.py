"""A data module for any folder of text files, with a vocabulary trained on the training files."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}


class TextDataModule(LightningDataModule):
    """Token sequences from a folder of text files.

    A hash of a file's relative path decides whether the file belongs to validation. So the split is the same on every
    machine, and no file changes sides when others are added or removed. The byte-level BPE vocabulary is trained on the
    training files only. Vocabulary and tokens are cached under a key made from the text and the settings.

    Args:
        root: A folder, searched with its subfolders. None: the source code of Python's standard library.
        pattern: Files to read, as in ``Path.glob``. None: all files, or ``**/*.py`` for the standard library.
        vocab_size: Size of the vocabulary; a small text may yield fewer tokens.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch.
        val_fraction: Share of the files used for validation.
        max_chars: Maximum number of characters to read, chosen by the same hash; None reads everything.
        cache_dir: Folder for the cached tokens; None means ``lightning_memopt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        num_workers: Worker processes per loader; the tokens are in memory, so workers have little to do.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        pattern: str | None = None,
        vocab_size: int = 2048,
        seq_len: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.1,
        max_chars: int | None = 4_000_000,
        cache_dir: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        # 256 bytes and the end of the text are in every vocabulary.
        for name, value, least in (
            ("vocab_size", vocab_size, 257),
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction` must be between 0 and 1, got {val_fraction}.")
        if max_chars is not None and max_chars < 1:
            raise ValueError(f"`max_chars` must be positive or null, got {max_chars}.")
        self.root = Path(root or sysconfig.get_paths()["stdlib"]).expanduser()
        self.pattern = pattern or ("**/*" if root else "**/*.py")
        self.vocab_size, self.seq_len, self.batch_size = vocab_size, seq_len, batch_size
        self.val_fraction, self.max_chars, self.num_workers = val_fraction, max_chars, num_workers
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.cache_dir = Path(cache_dir or f"{cache}/lightning_memopt").expanduser()
        self.tokenizer: tokenizers.Tokenizer | None = None
        self.tokens: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """Tokenize the text unless the cache holds it; runs in one process per machine."""
        if self.tokens:
            return
        texts, skipped = read_texts(self.root, self.pattern, self.val_fraction, self.max_chars)
        settings = (self.vocab_size, tokenizers.__version__)
        key = hashlib.sha256(repr((settings, texts)).encode()).hexdigest()[:16]
        self._cache_file = self.cache_dir / f"tokens-{key}.pt"
        known = self._cache_file.is_file()
        if not known:
            _save(tokenize(texts, self.vocab_size), self._cache_file)
        files = sum(map(len, texts.values()))
        rank_zero_info(
            f"{type(self).__name__}: {files:,} files of {self.root} ({skipped:,} skipped: not UTF-8 text), "
            f"{len(texts['val']):,} of them for validation; tokens {'from' if known else 'saved to'} {self._cache_file}"
        )

    def setup(self, stage: str | None = None) -> None:
        """Load the tokens."""
        if self.tokens:
            return
        if not hasattr(self, "_cache_file"):
            self.prepare_data()
        stored = torch.load(self._cache_file, weights_only=True)
        self.tokenizer = tokenizers.Tokenizer.from_str(stored["tokenizer"])
        for split in ("train", "val"):
            sequences = len(stored[split]) // self.seq_len
            needed = self.batch_size if split == "train" else 1
            if sequences < needed:
                raise ValueError(
                    f"The {split} files of {self.root} make {len(stored[split]):,} tokens, which is less than "
                    f"{needed} x {self.seq_len} ({'one batch' if split == 'train' else 'one sequence'}). Use more "
                    "text, or a smaller `seq_len`, `batch_size` or `vocab_size`."
                )
            self.tokens[split] = stored[split][: sequences * self.seq_len].view(sequences, self.seq_len).long()

    def _loader(self, split: str, **kwargs: Any) -> DataLoader[Tensor]:
        data: Any = self.tokens[split]
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers, **kwargs)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches ``[batch_size, seq_len]``."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of the validation files, always in the same order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation batches, because there is no third split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation batches."""
        return self.val_dataloader()


def read_texts(
    root: Path, pattern: str, val_fraction: float, max_chars: int | None
) -> tuple[dict[str, list[str]], int]:
    """Return the texts per split, ordered by a hash of their paths, and the number of files that are not UTF-8 text.

    Raises:
        NotADirectoryError: If ``root`` is not a folder.
        FileNotFoundError: If fewer than two text files match.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"`root` must be a folder of text files, but {str(root)!r} is not a folder.")
    paths = {
        hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(): path
        for path in root.glob(pattern)
        if path.is_file() and not any(_is_skipped(part) for part in path.relative_to(root).parts)
    }
    # The first bytes of the hash decide the side, the last ones the order. Otherwise a cap would favor one side.
    order = sorted(paths, key=lambda digest: digest[::-1])
    held_out = {digest for digest in order if int.from_bytes(digest[:4], "big") < val_fraction * 2**32}
    texts: dict[str, list[str]] = {"train": [], "val": []}
    skipped = 0
    for split, share in (("train", 1 - val_fraction), ("val", val_fraction)):
        left = float("inf") if max_chars is None else max(1, int(share * max_chars))
        for digest in order:
            if left <= 0:
                break
            if (digest in held_out) != (split == "val"):
                continue
            text = _read(paths[digest])
            skipped += text is None
            if text:
                texts[split].append(text if len(text) <= left else text[: int(left)])
                left -= len(text)
    for empty, other in (("val", "train"), ("train", "val")):
        # By chance, all of a few files may be on one side.
        if not texts[empty] and len(texts[other]) > 1:
            texts[empty].append(texts[other].pop())
    if not (texts["train"] and texts["val"]):
        raise FileNotFoundError(
            f"Splitting by file needs at least two non-empty text files; {str(root)!r} has {len(order):,} files that "
            f"match {pattern!r}, of which {skipped:,} are not UTF-8 text. Give another folder or `pattern`, or split "
            "the text into several files."
        )
    return texts, skipped


def tokenize(texts: dict[str, list[str]], vocab_size: int) -> dict[str, Any]:
    """Train a byte-level BPE vocabulary on the training texts and return it with the tokens of both splits."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["train"], trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    result: dict[str, Any] = {"tokenizer": tokenizer.to_str()}
    for split, documents in texts.items():
        ids = [token for encoding in tokenizer.encode_batch(documents) for token in (*encoding.ids, end)]
        result[split] = torch.tensor(ids, dtype=torch.int32)
    return result


def _is_skipped(part: str) -> bool:
    return part in SKIPPED_FOLDERS or (part.startswith(".") and part not in (".", ".."))


def _read(path: Path) -> str | None:
    """Return the text of a file, or None if it is not UTF-8 text."""
    try:
        text = path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text


def _save(content: dict[str, Any], path: Path) -> None:
    """Save so that another process sees either no file or a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            torch.save(content, stream)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
