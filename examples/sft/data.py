"""A data module of Python functions: packed rows for training and validation, the same on any number of ranks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, StackDataset

from examples.pretrain.order import ResumableDataModule
from examples.pretrain.texts import Texts, cache_folder, check_shares, source_folder
from examples.sft.chat import Example, encode
from examples.sft.functions import Pair, read_pairs
from examples.sft.packing import IGNORED, pack

Batch = dict[str, Tensor]


class FunctionsDataModule(ResumableDataModule):
    """Pairs of a function's head and its body, from a folder of Python files.

    The tokenizer is that of the model, a module with the attribute ``tokenizer``. A batch holds the same rows on any
    number of ranks, which divide it among themselves.

    Args:
        root: A folder, searched with its subfolders. None: the source code of Python's standard library.
        pattern: Files to read, as in ``Path.glob``.
        seq_len: Tokens per row, which holds several pairs.
        max_length: Tokens per pair; longer pairs are left out. At most the longest sequence of the model.
        batch_size: Rows per batch and process.
        val_fraction: Share of the files used for validation.
        max_chars: Maximum number of characters to read; None reads everything.
        cache_dir: Folder for the pairs; None means ``lightning_memopt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        num_workers: Worker processes per loader; the tokens are in memory, so workers have little to do.
        seed: Of the order of the rows.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        pattern: str = "**/*.py",
        seq_len: int = 512,
        max_length: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.1,
        max_chars: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 2 <= max_length <= seq_len:
            raise ValueError(f"`max_length` must be from 2 to `seq_len`, which is {seq_len}, got {max_length}.")
        check_shares(val_fraction, max_chars)
        self.root, self.pattern = source_folder(root), pattern
        self.seq_len, self.max_length, self.batch_size = seq_len, max_length, batch_size
        self.val_fraction, self.max_chars = val_fraction, max_chars
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = cache_folder(cache_dir)
        self.examples: dict[str, list[Example]] = {}
        self.rows: dict[str, Batch] = {}

    def prepare_data(self) -> None:
        """Fill the cache; runs in one process per machine."""
        self._pairs()

    def setup(self, stage: str | None = None) -> None:
        """Tokenize and pack the pairs.

        Raises:
            ValueError: If no pair is short enough, or the training pairs do not fill a batch.
        """
        if self.rows:
            return
        assert self.trainer is not None
        tokenizer: Any = self.trainer.lightning_module.tokenizer
        step = self.batch_size * self.ranks["num_replicas"]
        for split, found in self._pairs().items():
            self.examples[split] = [each for each in encode(tokenizer, found) if len(each) <= self.max_length]
            # Rows of padding make the last validation batch full. They have no labels, so they do not count.
            multiple = step if split == "val" else 1
            rows = pack(self.examples[split], self.seq_len, tokenizer.eos_token_id, multiple=multiple)
            if len(rows["labels"]) < step:
                raise ValueError(
                    f"Of {len(found):,} {split} functions of {self.root}, {len(self.examples[split]):,} have at most "
                    f"{self.max_length} tokens. They fill {len(rows['labels']):,} rows of {self.seq_len}, less than "
                    f"the {step} of a batch on all processes. Use more files, a larger `max_length` or a smaller "
                    "`batch_size`."
                )
            self.rows[split] = rows
            rank_zero_info(
                f"{split}: {len(self.examples[split]):,} of {len(found):,} functions have at most {self.max_length} "
                f"tokens; {len(rows['labels']):,} rows, {(rows['labels'] != IGNORED).sum():,} tokens of answers"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's parts of shuffled batches; a resumed run continues with the next ones."""
        return self.resumable(self._dataset("train"), self.batch_size, self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's parts of the validation batches, always in the same order."""
        rows = self._dataset("val")
        sampler = DistributedSampler(rows, **self.ranks, shuffle=False)
        return DataLoader(rows, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def _pairs(self) -> dict[str, list[Pair]]:
        return read_pairs(Texts(self.root, self.pattern, self.val_fraction, self.max_chars), self.cache_dir)

    def _dataset(self, split: str) -> Any:
        return StackDataset(**self.rows[split])
