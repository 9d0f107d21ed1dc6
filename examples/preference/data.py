"""What both methods share of their data: the functions of fine-tuning, in a reproducible order."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from examples.pretrain.order import ResumableDataModule
from examples.pretrain.texts import Texts, cache_folder, check_shares, source_folder
from examples.sft.functions import Pair, read_pairs


class PreferenceDataModule(ResumableDataModule):
    """Examples made from the functions of a folder.

    They are those of fine-tuning, with the split of pretraining: the policy has never seen the validation functions of
    the same folder. A subclass makes examples in ``example`` and batches in ``collate``.

    Every rank reads all functions. A training batch takes the next examples of one order, which depends on the seed and
    the epoch alone: a step has the same examples on any number of ranks if ``batch_size`` times the ranks is the same.
    In validation, Lightning repeats examples until all ranks have as many.

    The tokenizer is that of the model, a module with the attribute ``tokenizer``.

    Args:
        root: A folder of Python files. None: Python's standard library.
        batch_size: Examples per batch and rank.
        val_fraction: Share of the files used for validation.
        cache_dir: Folder for the functions; None means ``lightning_memopt`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        seed: Of the order, and of what is drawn to make examples.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        val_fraction: float = 0.1,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        check_shares(val_fraction)
        self.root, self.val_fraction = source_folder(root), val_fraction
        self.batch_size, self.seed = batch_size, seed
        self.cache_dir = cache_folder(cache_dir)
        self.examples: dict[str, list[Any]] = {}

    def prepare_data(self) -> None:
        """Fill the cache; runs in one process per machine."""
        self._pairs()

    def setup(self, stage: str | None = None) -> None:
        """Make the examples.

        Raises:
            ValueError: If there is less than one training batch for all ranks, or no validation example.
        """
        if self.examples:
            return
        assert self.trainer is not None
        self.tokenizer: Any = self.trainer.lightning_module.tokenizer
        pairs = self._pairs()
        examples = {
            split: [made for pair in found if (made := self.example(pair)) is not None]
            for split, found in pairs.items()
        }
        needed = {"train": self.batch_size * self.ranks["num_replicas"], "val": 1}
        if any(len(examples[split]) < least for split, least in needed.items()):
            counts = " and ".join(
                f"{len(pairs[split]):,} {split} functions make {len(examples[split]):,} of at least {least:,} examples"
                for split, least in needed.items()
            )
            raise ValueError(
                f"In {self.root}, {counts} that are short enough: use a folder with more functions, longer sequences "
                "or a smaller `batch_size`."
            )
        self.examples = examples
        rank_zero_info(
            f"{type(self).__name__}: {sum(map(len, pairs.values())):,} functions in {self.root} make "
            f"{len(examples['train']):,} training and {len(examples['val']):,} validation examples"
        )

    def example(self, pair: Pair) -> Any | None:
        """Return the example of a function, or None if it does not make one."""
        raise NotImplementedError

    def collate(self, examples: list[Any]) -> Any:
        """Return a batch."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches, which a resumed run continues with the next ones."""
        data: Any = self.examples["train"]
        return self.resumable(data, self.batch_size, self.seed, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches that are always in the same order."""
        data: Any = self.examples["val"]
        return DataLoader(data, self.batch_size, collate_fn=self.collate)

    def _pairs(self) -> dict[str, list[Pair]]:
        return read_pairs(Texts(self.root, "**/*.py", self.val_fraction, None), self.cache_dir)
