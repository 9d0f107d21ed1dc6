"""A data module for images: made ones, or a folder of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.pretrain.texts import check_shares
from examples.vision.folder import FolderDataset, read_folder
from examples.vision.shapes import ShapesDataset


class ImageDataModule(LightningDataModule):
    """Batches of images ``[batch, 3, image_size, image_size]`` with values in [-1, 1], and their classes ``[batch]``.

    Args:
        root: A folder with the images of each class in a folder of its own. None: images of textured shapes, made here.
        num_classes: Number of classes; a folder must have as many.
        image_size: Height and width in pixels.
        batch_size: Images per batch and process.
        train_size: Number of images that are made for training; unused with ``root``.
        val_size: Number of images that are made for validation; unused with ``root``.
        val_fraction: Share of the files used for validation; unused without ``root``.
        num_workers: Worker processes per loader; images are made or decoded there.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        num_classes: int = 10,
        image_size: int = 32,
        batch_size: int = 64,
        train_size: int = 20_000,
        val_size: int = 1_000,
        val_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("train_size", train_size, batch_size),
            ("val_size", val_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        check_shares(val_fraction)
        self.root = Path(root).expanduser() if root else None
        self.num_classes, self.image_size, self.batch_size = num_classes, image_size, batch_size
        self.sizes = {"train": train_size, "val": val_size}
        self.val_fraction, self.num_workers = val_fraction, num_workers
        self.datasets: dict[str, Dataset[tuple[Tensor, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the images of both splits.

        Raises:
            ValueError: If the folder has another number of classes, or fewer training images than a batch.
        """
        if self.datasets:
            return
        if self.root is None:
            made = {"num_classes": self.num_classes, "image_size": self.image_size}
            self.datasets = {split: ShapesDataset(size, seed=split, **made) for split, size in self.sizes.items()}
            return
        classes, files = read_folder(self.root, self.val_fraction)
        if len(classes) != self.num_classes:
            raise ValueError(
                f"{str(self.root)!r} has {len(classes)} classes, `num_classes` is {self.num_classes}: set the data's "
                f"`num_classes` and the model's `num_labels` to {len(classes)}."
            )
        if len(files["train"]) < self.batch_size:
            raise ValueError(
                f"{str(self.root)!r} has {len(files['train'])} images for training, fewer than a batch of "
                f"{self.batch_size}: lower `batch_size`, or add images."
            )
        self.datasets = {
            split: FolderDataset(files[split], image_size=self.image_size, random_crop=split == "train")
            for split in ("train", "val")
        }

    def _loader(self, split: str, **kwargs: Any) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(self.datasets[split], batch_size=self.batch_size, num_workers=self.num_workers, **kwargs)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return shuffled batches."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the validation images, always in the same order."""
        return self._loader("val")
