"""A data module for any folder of text files, with a vocabulary trained on them, or a given one."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from examples.pretrain.order import ResumableDataModule
from examples.pretrain.texts import Texts, cache_folder, check_shares, source_folder
from examples.pretrain.tokens import Tokens, cached, load
from examples.pretrain.vocabulary import given_tokenizer, trained_tokenizer


class TextDataModule(ResumableDataModule):
    """Token sequences from a folder of text files, divided by file into training and validation (`Texts`).

    Validation files of which more than half of the long lines are in training files are left out: a model knows them.
    Unless a tokenizer is given, a byte-level BPE vocabulary is trained on the training files only. It is cached with
    the tokens, under a name made from the files and the settings. Tokens are mapped into memory. A resumed run
    continues with the next sequences.

    Args:
        root: A folder, searched with its subfolders. None: the source code of Python's standard library.
        pattern: Files to read, as in ``Path.glob``. None: all files, or ``**/*.py`` for the standard library.
        vocab_size: Size of the vocabulary; a small text may yield fewer tokens. That of the tokenizer if one is given.
        tokenizer: A folder that a tokenizer's ``save_pretrained`` wrote, to use it instead of training one.
        seq_len: Tokens per sequence.
        batch_size: Sequences per batch and process.
        val_fraction: Share of the files used for validation.
        max_chars: Maximum number of characters to read, chosen by the same hash; None reads everything.
        cache_dir: Folder for the cached tokens; None means ``lightning_memopt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        num_workers: Worker processes per loader; the tokens are in memory, so workers have little to do.
        seed: Of the order of the sequences.

    Raises:
        FileNotFoundError: If ``tokenizer`` is not such a folder.
        ValueError: If a setting is out of range, or does not fit the tokenizer.
    """

    def __init__(
        self,
        root: str | None = None,
        pattern: str | None = None,
        vocab_size: int = 2048,
        tokenizer: str | None = None,
        seq_len: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.1,
        max_chars: int | None = 4_000_000,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # 256 bytes and the end of the text are in every vocabulary that is trained here.
        for name, value, least in (
            ("vocab_size", vocab_size, 257 if tokenizer is None else 1),
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        check_shares(val_fraction, max_chars)
        self.root = source_folder(root)
        self.pattern = pattern or ("**/*" if root else "**/*.py")
        self.vocab_size, self.seq_len, self.batch_size = vocab_size, seq_len, batch_size
        self.val_fraction, self.max_chars = val_fraction, max_chars
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = cache_folder(cache_dir)
        self._given = None if tokenizer is None else given_tokenizer(tokenizer, vocab_size)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.tokens: dict[str, Tokens] = {}

    def prepare_data(self) -> None:
        """Tokenize the text unless the cache holds it; runs in one process per machine."""
        if self.tokens:
            return
        texts = self._texts()
        folder, known = cached(texts, self.vocab_size, self.cache_dir, self._given)
        rank_zero_info(
            f"{type(self).__name__}: {sum(map(len, texts.files.values())):,} files in {self.root}, "
            f"{len(texts.files['val']):,} of them for validation; tokens {'from' if known else 'saved to'} {folder}"
        )

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens into memory.

        Raises:
            ValueError: If there is less than one training batch, or less than one validation sequence.
        """
        if self.tokens:
            return
        folder, _ = cached(self._texts(), self.vocab_size, self.cache_dir, self._given)
        tokens = load(folder, self.seq_len)
        for split, needed in (("train", self.batch_size), ("val", 1)):
            if len(tokens[split]) < needed:
                raise ValueError(
                    f"The {split} files of {self.root} make {tokens[split].count:,} tokens, which is less than "
                    f"{needed} x {self.seq_len} ({'one batch' if split == 'train' else 'one sequence'}). Use more "
                    "text, or a smaller `seq_len`, `batch_size` or `vocab_size`."
                )
        tokenizer = trained_tokenizer(folder / "tokenizer.json") if self._given is None else self._given
        known = len(tokenizer)
        if known < self.vocab_size:
            rank_zero_warn(
                f"The training files of {self.root} yield {known:,} different tokens, fewer than `vocab_size` "
                f"{self.vocab_size:,}: {self.vocab_size - known:,} rows of the model's embedding and head belong to "
                f"none. Use more text, or --data.vocab_size {known} --model.vocab_size {known}."
            )
        self.tokenizer, self.tokens = tokenizer, tokens

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return batches ``[batch_size, seq_len]`` in an order that does not depend on the number of processes."""
        return self.resumable(self.tokens["train"], self.batch_size, self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of the validation files, always in the same order."""
        return DataLoader(self.tokens["val"], batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation batches, because there is no third split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return the validation batches."""
        return self.val_dataloader()

    def _texts(self) -> Texts:
        return Texts(self.root, self.pattern, self.val_fraction, self.max_chars)
