"""Reading one file of torch's, with errors that name it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_torch_file(path: Path, *, weights_only: bool | None = None, map_location: Any = "cpu") -> Any:
    """Return what ``torch.save`` wrote; tensors are mapped into memory, so that only what is used is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, or is not a file of torch's.
        pickle.UnpicklingError: If it holds objects and only tensors and builtins are allowed.
    """
    with path.open("rb") as stream:
        magic = stream.read(len(_ZIP))
    if magic != _ZIP and not magic.startswith(_PICKLE):
        raise ValueError(f"{str(path)!r} is no checkpoint: it is empty, or torch.save did not write it.")
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=magic == _ZIP)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{str(path)!r} cannot be read: {error} Lightning's Trainer does not tell sharded strategies of "
            "weights_only=False. If you trust the source of this file, set the environment variable "
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, or name the classes with torch.serialization.add_safe_globals. To "
            "need no trust, keep other objects than tensors and builtins out of hyperparameters and callback states."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{str(path)!r} is truncated or damaged: {error}. Use another checkpoint.") from error
