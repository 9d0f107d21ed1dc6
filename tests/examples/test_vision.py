from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.pretrain.texts import is_held_out
from examples.vision.data import ImageDataModule
from examples.vision.folder import FolderDataset, read_folder
from examples.vision.model import ViTModule
from examples.vision.shapes import SHAPES, TEXTURES, ShapesDataset, shape, texture
from tests._ranks import run_ranks
from tests.examples._run import RECIPES, configs, fit_on_ranks

pytestmark = pytest.mark.slow

SMALL = (
    "--data.num_classes=4", "--data.image_size=8", "--data.batch_size=4", "--data.train_size=24", "--data.val_size=10",
    "--model.num_labels=4", "--model.image_size=8", "--model.patch_size=4", "--model.hidden_size=16",
    "--model.intermediate_size=32", "--model.num_hidden_layers=1", "--model.num_attention_heads=2",
    "--trainer.val_check_interval=3", "--trainer.logger=false",
)  # fmt: skip
TINY = {"num_labels": 3, "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


def save_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with 12 red and 12 blue images."""
    for number in range(12):
        save_image(tmp_path / "images" / "red" / f"{number}.png", (255, 0, 0))
        save_image(tmp_path / "images" / "blue" / f"{number % 3}" / f"{number}.jpg", (0, 0, 255))
    return tmp_path / "images"


@pytest.mark.parametrize("overlay", [None, *RECIPES])
def test_every_config_trains(fit: Callable[..., Any], overlay: str | None):
    files = ["vision/vit.yaml"] + ([f"vision/{overlay}.yaml"] if overlay else [])
    trainer = fit(*configs(*files), *SMALL).trainer
    assert trainer.global_step == 3
    assert "val_accuracy" in trainer.callback_metrics
    (optimizer,) = trainer.optimizers
    if overlay != "adamw":
        roles = {block.role for block in optimizer.snapshot().blocks}
        assert roles >= {"embedding", "query", "key", "value", "attention_output", "mlp", "head", "vector"}
        assert not roles & {"linear", "other"}


def test_every_recipe_trains_on_two_ranks(tmp_path: Path):
    commands = [[*configs("vision/vit.yaml", f"vision/{recipe}.yaml"), *SMALL] for recipe in RECIPES]
    first, second = run_ranks(fit_on_ranks, 2, commands, str(tmp_path))
    for here, there in zip(first, second, strict=True):
        assert here["steps"] == 3
        assert here["sharded"] == 1
        # Accuracy is that of all images, on both ranks.
        assert here["metrics"]["val_accuracy"] == there["metrics"]["val_accuracy"]
        assert (here["metrics"]["val_accuracy"] * 10) == pytest.approx(round(here["metrics"]["val_accuracy"] * 10))


def test_a_folder_of_images_trains(fit: Callable[..., Any], images: Path):
    arguments = [arg for arg in SMALL if "num_classes" not in arg and "num_labels" not in arg]
    mine = (f"--data.root={images}", "--data.num_classes=2", "--data.val_fraction=0.3", "--model.num_labels=2")
    assert fit(*configs("vision/vit.yaml"), *arguments, *mine).trainer.global_step == 3


def test_loss_and_accuracy_are_those_of_all_images(tmp_path: Path):
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    data = ImageDataModule(num_classes=3, image_size=8, batch_size=4, train_size=4, val_size=10)
    module = ViTModule(**TINY)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(module, data, verbose=False)
    pictures, labels = zip(*(data.datasets["val"][index] for index in range(10)), strict=True)
    with torch.no_grad():
        logits = module.eval().model(pixel_values=torch.stack(pictures)).logits
    labels = torch.tensor(labels)
    assert found["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_images_are_pure_functions_of_seed_and_index():
    def made(seed: str) -> ShapesDataset:
        return ShapesDataset(40, num_classes=20, image_size=16, seed=seed)

    torch.manual_seed(1)
    first = made("train")[7]
    torch.manual_seed(2)
    again = made("train")[7]
    torch.testing.assert_close(first[0], again[0], rtol=0, atol=0)
    assert first[1] == again[1] == 7
    assert not torch.equal(first[0], made("val")[7][0])
    assert not torch.equal(first[0], made("train")[27][0]), "the same class, another image"
    labels = [label for _, label in (made("train")[index] for index in range(40))]
    assert sorted(labels) == sorted([*range(20)] * 2)
    pictures = torch.stack([made("train")[index][0] for index in range(40)])
    assert pictures.shape == (40, 3, 16, 16)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    with pytest.raises(IndexError, match="There are 40 images, got the index 40"):
        made("train")[40]


def test_shapes_and_textures_differ():
    axis = torch.linspace(-1, 1, 101)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    masks = [shape(name, u, v) for name in SHAPES]
    masks += [texture(name, u, v) for name in TEXTURES]
    for number, mask in enumerate(masks):
        assert 0.1 < mask.float().mean() <= 1
        for other in masks[:number]:
            assert (mask != other).float().mean() > 0.1
    assert all(not (mask & (torch.hypot(u, v) > 1.1)).any() for mask in masks[: len(SHAPES)])


def test_the_split_follows_paths_only(images: Path):
    classes, files = read_folder(images, 0.3)
    assert classes == ["blue", "red"]
    assert sorted(path for path, _ in files["train"] + files["val"]) == sorted(p for p in images.rglob("*.*"))
    assert all(path.relative_to(images).parts[0] == classes[label] for path, label in files["train"] + files["val"])
    save_image(images / "red" / "new.png", (1, 2, 3))
    _, more = read_folder(images, 0.3)
    assert set(files["val"]) <= set(more["val"])
    assert set(files["train"]) <= set(more["train"])
    shares = [is_held_out(f"red/{number}.png", 0.1) for number in range(10_000)]
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.02)


def test_crops_are_squares_in_red_green_blue(tmp_path: Path):
    from PIL import Image

    # Left half red, right half blue, twice as wide as high; and a gray one with an alpha channel.
    wide = Image.new("RGB", (16, 8), (255, 0, 0))
    wide.paste((0, 0, 255), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    Image.new("LA", (8, 8), (51, 255)).save(tmp_path / "gray.png")
    files = [(tmp_path / "wide.png", 1), (tmp_path / "gray.png", 0)]
    image, label = FolderDataset(files, image_size=8, random_crop=False)[0]
    assert (image.shape, label) == ((3, 8, 8), 1)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(image[:, 0, 7], torch.tensor([-1.0, -1.0, 1.0]))
    gray, _ = FolderDataset(files, image_size=8, random_crop=False)[1]
    torch.testing.assert_close(gray, torch.full((3, 8, 8), 51 / 127.5 - 1))
    random = FolderDataset(files, image_size=8, random_crop=True)
    reds = {(random[0][0][0, 0] > 0).sum().item() for _ in range(20)}
    assert len(reds) > 1, "crops lie at random places"


def test_folders_that_cannot_be_used(tmp_path: Path, images: Path):
    with pytest.raises(NotADirectoryError, match="nowhere' is not a folder"):
        read_folder(tmp_path / "nowhere", 0.1)
    with pytest.raises(FileNotFoundError, match="at least two classes, it has 0"):
        read_folder(images / "red", 0.1)
    with pytest.raises(FileNotFoundError, match="None of the 24 images in .* fell into the val split"):
        read_folder(images, 1e-6)
    with pytest.raises(ValueError, match="has 2 classes, `num_classes` is 3"):
        ImageDataModule(str(images), num_classes=3, batch_size=2).setup()
    with pytest.raises(ValueError, match="images for training, fewer than a batch of 64"):
        ImageDataModule(str(images), num_classes=2).setup()
    (images / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.png' cannot be read as an image"):
        FolderDataset([(images / "red" / "broken.png", 0)], image_size=8, random_crop=False)[0]
    (images / "green").mkdir()
    with pytest.raises(FileNotFoundError, match="The class 'green' in .* has no image"):
        read_folder(images, 0.1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_classes", 1),
        ("image_size", 0),
        ("batch_size", 0),
        ("train_size", 63),
        ("val_size", 0),
        ("val_fraction", 1.0),
    ],
)
def test_settings_out_of_range(option: str, value: float):
    with pytest.raises(ValueError, match=f"`{option}` must be .*{value}"):
        ImageDataModule(**{option: value})


def test_data_and_model_must_fit(fit: Callable[..., Any]):
    with pytest.raises(ValueError, match="The data's `num_classes` is 4, the model's `num_labels` 3: make them equal"):
        fit(*configs("vision/vit.yaml"), *SMALL, "--model.num_labels=3")
    with pytest.raises(ValueError, match="`patch_size` 5 must divide `image_size` 32"):
        ViTModule(patch_size=5)
    with pytest.raises(ValueError, match="2 to 20 classes, got `num_classes` 21"):
        ShapesDataset(1, num_classes=21, image_size=8, seed="")
