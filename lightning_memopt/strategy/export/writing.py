"""Write an export: a file or a folder that appears under its name complete, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_memopt._registry import listed
from lightning_memopt.strategy.checkpoint.io import save_with_checksums
from lightning_memopt.strategy.export.weights import separate
from lightning_memopt.strategy.files import atomic

# What `save_pretrained` writes.
_PRETRAINED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def check_free(out: Path, *, force: bool) -> None:
    """Refuse to replace what exists.

    Args:
        out: The file or folder to write.
        force: Whether to replace what an export has written.

    Raises:
        FileExistsError: If it exists and ``force`` is not set, or if it is a folder with other files.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise FileExistsError(f"{str(out)!r} exists: name another place, or add --force to replace it.")
    others = (
        [entry.name for entry in sorted(out.iterdir()) if not any(map(entry.match, _PRETRAINED))]
        if out.is_dir()
        else []
    )
    if others:
        raise FileExistsError(
            f"{str(out)!r} holds files that replacing it would delete: {listed(list(map(repr, others)), 3)}. Name "
            "another place."
        )


def write_pickled(value: Any, out: Path) -> None:
    """Write a file of ``torch.save``.

    Raises:
        OSError: If it cannot be written. An existing file is unchanged then.
    """
    atomic.write_file(out, lambda stream: save_with_checksums(value, stream))


def write_safetensors(weights: Mapping[str, Any], out: Path) -> None:
    """Write a file of safetensors.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If an entry is not a tensor.
        OSError: If it cannot be written. An existing file is unchanged then.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"This format needs safetensors ({error}): pip install safetensors. Or name a file that ends in .pt."
        ) from error
    tensors = separate(weights)
    _write(out, lambda new: save_file(tensors, new, metadata={"format": "pt"}))


def write_pretrained(model: nn.Module, out: Path) -> None:
    """Write a folder that ``from_pretrained`` reads.

    Raises:
        OSError: If it cannot be written. An existing folder is unchanged then.
    """
    _write(out, model.save_pretrained)  # type: ignore[arg-type]


def _write(out: Path, write: Callable[[Path], Any]) -> None:
    new = atomic.begin(out)
    try:
        write(new)
        for path in new.iterdir() if new.is_dir() else [new]:
            atomic.sync_file(path)
        atomic.commit(new, out)
    finally:
        atomic.abandon(new)  # after a commit there is nothing to remove
