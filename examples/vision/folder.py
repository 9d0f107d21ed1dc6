"""Images of a folder ``root/<class>/<image>``, split by a hash of their paths."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from examples.pretrain.texts import is_held_out

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CENTER = (0.5, 0.5)


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Square crops of image files.

    Args:
        files: The paths and their classes.
        image_size: Height and width of a crop in pixels; an image is scaled so that its shorter side has this length.
        random_crop: Whether the crop lies at a random place of the longer side, for training, or in the middle.
    """

    def __init__(self, files: list[tuple[Path, int]], *, image_size: int, random_crop: bool) -> None:
        self.files, self.image_size, self.random_crop = files, image_size, random_crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image ``[3, image_size, image_size]`` with values in [-1, 1], and its class.

        Raises:
            ValueError: If the file is not an image.
        """
        path, label = self.files[index]
        x, y = torch.rand(2).tolist() if self.random_crop else CENTER
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as an image ({error}): repair or remove it.") from error
        crop = ImageOps.fit(upright, (self.image_size, self.image_size), Image.Resampling.BILINEAR, centering=(x, y))
        pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
        image = pixels.view(self.image_size, self.image_size, 3).permute(2, 0, 1)
        return image / 127.5 - 1, label


def read_folder(root: Path, val_fraction: float) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Return the names of the classes, in alphabetical order, and the files of both splits with their classes.

    A hash of the path below ``root`` decides the side, so that no file changes sides when others come or go.

    Args:
        root: A folder with one folder per class, whose subfolders are searched, too.
        val_fraction: Share of the files used for validation.

    Raises:
        NotADirectoryError: If ``root`` is not a folder.
        FileNotFoundError: If there are fewer than two classes, a class has no image, or a split has none.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"`root` must be a folder of images, but {str(root)!r} is not a folder.")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{str(root)!r} must have a folder of images for each of at least two classes, it has {len(classes)}: move "
            "the images to ROOT/CLASS/IMAGE."
        )
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "val": []}
    for label, name in enumerate(classes):
        images = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not images:
            raise FileNotFoundError(
                f"The class {name!r} in {str(root)!r} has no image ({', '.join(sorted(SUFFIXES))}): add some, or "
                "remove the folder."
            )
        for path in images:
            held_out = is_held_out(path.relative_to(root).as_posix(), val_fraction)
            files["val" if held_out else "train"].append((path, label))
    for split, found in files.items():
        if not found:
            total = sum(map(len, files.values()))
            raise FileNotFoundError(
                f"None of the {total} images in {str(root)!r} fell into the {split} split with `val_fraction` "
                f"{val_fraction}: add images, or change `val_fraction`."
            )
    return classes, files
