"""A Vision Transformer from transformers, trained from random weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification


class ViTModule(LightningModule):
    """A ViT of any size that classifies images; the arguments are those of ``transformers.ViTConfig``.

    The class has no ``configure_optimizers``, because the command line supplies the optimizer. The defaults give a
    model with 0.5 million parameters.

    Args:
        num_labels: Number of classes.
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch, which must divide those of the image.
        hidden_size: Width of the model.
        intermediate_size: Width inside an MLP.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads per layer.

    Raises:
        ValueError: If patches do not divide the image.
    """

    def __init__(
        self,
        num_labels: int = 10,
        image_size: int = 32,
        patch_size: int = 8,
        hidden_size: int = 96,
        intermediate_size: int = 384,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"`patch_size` {patch_size} must divide `image_size` {image_size}.")
        config = ViTConfig(
            num_labels=num_labels,
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        )
        self.save_hyperparameters()
        self.model = ViTForImageClassification(config)
        # Models from transformers start in evaluation mode, and Lightning keeps that mode.
        self.model.train()
        # A micro-average counts images, so that classes of different sizes count by their sizes.
        self.val_accuracy = MulticlassAccuracy(num_labels, average="micro")

    def setup(self, stage: str) -> None:
        """Check that the data fit the model, because a class out of range crashes a GPU without a clear error.

        Raises:
            ValueError: If the number of classes or the size of the images differ.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        for theirs, ours in (("num_classes", "num_labels"), ("image_size", "image_size")):
            given, expected = getattr(data, theirs, None), getattr(self.model.config, ours)
            if given is not None and given != expected:
                raise ValueError(f"The data's `{theirs}` is {given}, the model's `{ours}` {expected}: make them equal.")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the cross-entropy of a batch, in nats."""
        images, labels = batch
        loss = self.model(pixel_values=images, labels=labels).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the cross-entropy and the share of correct classes, over all images of all processes."""
        images, labels = batch
        output = self.model(pixel_values=images, labels=labels)
        self.val_accuracy(output.logits, labels)
        self.log("val_loss", output.loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
