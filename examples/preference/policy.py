"""A policy that trains, beside the frozen model that it started from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.sft.model import check_folder


class PolicyAndReference(LightningModule):
    """Hold two copies of a pretrained language model: ``model``, which trains, and the frozen ``reference``.

    Both are in evaluation mode: dropout would move the policy away from the reference before it has learned anything,
    and sample from a policy other than the one whose gradient is computed. Both are children, so that
    ``memopt_fsdp`` shards both. The reference is part of every checkpoint: a resumed run needs it, and the folder may
    have changed.

    Args:
        path: A folder that transformers' ``save_pretrained`` wrote, with the tokenizer.

    Raises:
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(check_folder(path), local_files_only=True)
        self.model = load_model(path).eval()
        self.reference = load_model(path).eval().requires_grad_(False)

    def check_fits(self, length: int) -> None:
        """Check that the data fit the model, because an index out of range crashes a GPU without a clear error.

        Args:
            length: The most tokens of a sequence.

        Raises:
            ValueError: If the vocabulary or the sequences exceed those of the model.
        """
        config: Any = self.model.config
        if len(self.tokenizer) > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, the model of the same folder only "
                f"{config.vocab_size}: give the folder the tokenizer that the model was trained with."
            )
        if length > config.max_position_embeddings:
            raise ValueError(
                f"Sequences have up to {length} tokens, but the model's `max_position_embeddings` is "
                f"{config.max_position_embeddings}: lower the lengths of the data, or pretrain with a larger `seq_len`."
            )


def load_model(path: str) -> PreTrainedModel:
    """Return the model of a folder, with weights in float32: precision is a setting of the Trainer."""
    return AutoModelForCausalLM.from_pretrained(check_folder(path), dtype="float32", local_files_only=True)
