"""A data module of Python functions: packed rows for training and validation, the same on any number of ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, StackDataset

from examples.pretrain.order import ResumableDataModule
from examples.pretrain.texts import Texts, cache_folder, check_shares, source_folder
from examples.sft.chat import Example, encode
from examples.sft.functions import Pair, read_pairs
from examples.sft.generation import ParseRate
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
            ValueError: If they do not suffice, or do not fit the model. The message names everything that is wrong.
        """
        if self.rows:
            return
        assert self.trainer is not None
        tokenizer: Any = self.trainer.lightning_module.tokenizer
        step = self.batch_size * self.ranks["num_replicas"]
        encoded = {split: encode(tokenizer, found) for split, found in self._pairs().items()}
        examples = {split: [each for each in found if len(each) <= self.max_length] for split, found in encoded.items()}
        # Rows of padding make the last validation batch full. They have no labels, so they do not count.
        rows = {
            split: pack(found, self.seq_len, tokenizer.eos_token_id, multiple=step if split == "val" else 1)
            for split, found in examples.items()
        }
        wrong = [*self._too_few(encoded, rows, step), *self._misfits(examples)]
        if wrong:
            listed = "\n".join(f"- {each}" for each in wrong)
            raise ValueError(f"The functions of {self.root} do not suffice, or do not fit:\n{listed}")
        self.examples, self.rows = examples, rows
        for split, found in encoded.items():
            rank_zero_info(
                f"{split}: {len(examples[split]):,} of {len(found):,} functions have at most {self.max_length} tokens; "
                f"{len(rows[split]['labels']):,} rows, {(rows[split]['labels'] != IGNORED).sum():,} tokens of answers"
            )

    def _too_few(self, encoded: dict[str, list[Example]], rows: dict[str, Batch], step: int) -> Iterator[str]:
        """Yield which splits have fewer rows than a batch of ``step`` on all processes, and why."""
        for split, found in encoded.items():
            if not found:
                yield (
                    f"No {split} file has a function with a docstring and a body: use more files, or another `pattern`."
                )
            elif len(rows[split]["labels"]) < step:
                lengths = list(map(len, found))
                yield (
                    f"{sum(length <= self.max_length for length in lengths):,} of {len(found):,} {split} functions "
                    f"have at most {self.max_length} tokens, half at most {statistics.median_low(lengths)}, and fill "
                    f"{len(rows[split]['labels']):,} rows of {self.seq_len}, less than the {step} of a batch on all "
                    "processes: use more files, a larger `max_length` or a smaller `batch_size`."
                )

    def _misfits(self, examples: dict[str, list[Example]]) -> Iterator[str]:
        """Yield why model and callbacks, which are set up after the data, would refuse the pairs."""
        assert self.trainer is not None
        model: Any = self.trainer.lightning_module.model
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.max_length > limit:
            yield (
                f"The data's `max_length` is {self.max_length}, the model's `max_position_embeddings` only {limit}: "
                f"add --data.max_length={limit}."
            )
        for callback in self.trainer.callbacks:
            if isinstance(callback, ParseRate) and examples["val"]:
                try:
                    callback.tasks_of(examples["val"], self.max_length)
                except ValueError as error:
                    yield str(error)

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
