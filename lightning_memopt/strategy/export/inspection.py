"""What a checkpoint holds, in numbers, read without a model and without unpickling anything that could run code."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.optim.block import OF_PARAMETERS
from lightning_memopt.optim.checkpoint.names import saved_names
from lightning_memopt.optim.weights import LOW_BITS
from lightning_memopt.strategy.checkpoint.save import CURRENT
from lightning_memopt.strategy.export.contents import Contents, opened, outline
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory

_RANK = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class SavedBlock:
    """The state of one block.

    Attributes:
        name: The parameter's name or position; in a fused parameter, followed by a colon and the role.
        momentum: The momentum kind; for optimizers of other packages, the keys of the state.
        rank: The rank of the momentum; None if its kind has none.
        second_moment: The second-moment kind.
        bytes: Size of the state.
    """

    name: str
    momentum: str
    rank: int | None
    second_moment: str
    bytes: int


@dataclass(frozen=True)
class SavedOptimizer:
    """One optimizer.

    Attributes:
        recipes: The names of the recipes of its groups; empty for optimizers of other packages.
        learning_rates: Of its groups.
        parameters: Number of parameter tensors.
        bytes: Size of the state, with counters.
        weight_bits: How many bits of bfloat16 weights it keeps together with them, if more than 16.
        blocks: All blocks with state.
    """

    recipes: list[str]
    learning_rates: list[float]
    parameters: int
    bytes: int
    weight_bits: list[int]
    blocks: list[SavedBlock]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint.

    Attributes:
        path: Where it is.
        format: ``directory`` or ``file``.
        files: File name → size in bytes.
        ranks: Number of ranks that saved it; None for a file, which does not tell.
        step: The Trainer's ``global_step``; None if it is not there.
        epoch: The Trainer's epoch, in the same way.
        lightning: The version of Lightning that saved it, in the same way.
        checksums: ``verified``, ``not verified`` or ``none``.
        weights: Number of weight tensors.
        parameters: Number of elements of all weights, with buffers.
        weight_bytes: Size of all weights.
        dtypes: The dtypes of weights.
        averaged: Whether they are averages, beside which the weights that train are saved.
        optimizers: The optimizers.
    """

    path: str
    format: str
    files: dict[str, int]
    ranks: int | None
    step: int | None
    epoch: int | None
    lightning: str | None
    checksums: str
    weights: int
    parameters: int
    weight_bytes: int
    dtypes: list[str]
    averaged: bool
    optimizers: list[SavedOptimizer]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as builtins."""
        return asdict(self)


def inspect_checkpoint(path: str | Path, *, verify: bool = True) -> Inspection:
    """Return what a checkpoint of either format holds.

    Args:
        path: A directory or a file, or its URL.
        verify: Whether to read everything once, to compare checksums.

    Raises:
        ValueError: If it is missing, incomplete or damaged, or is not a checkpoint.
        TypeError: If it is not a checkpoint.
        pickle.UnpicklingError: If it contains objects that are not allowed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no checksums")  # the result says so
        with opened(path, verify=verify) as found:
            content = outline(found, verify=verify)
            files, is_directory = found.sizes(), isinstance(found, OpenedDirectory)
            checked = "none" if not found.has_checksums else "verified" if verify else "not verified"
    ranks = [int(match[1]) for name in files if (match := _RANK.fullmatch(name))]
    tensors = [value for value in content.weights.values() if isinstance(value, Tensor)]
    return Inspection(
        path=str(path),
        format="directory" if is_directory else "file",
        files=files,
        ranks=max(ranks) + 1 if ranks else None,
        step=content.rest.get("global_step"),
        epoch=content.rest.get("epoch"),
        lightning=content.rest.get("pytorch-lightning_version"),
        checksums=checked,
        weights=len(tensors),
        parameters=sum(value.numel() for value in tensors),
        weight_bytes=sum(value.nbytes for value in tensors),
        dtypes=sorted({str(value.dtype).removeprefix("torch.") for value in tensors}),
        averaged=CURRENT in content.rest,
        optimizers=_optimizers(content),
    )


def _optimizers(content: Contents) -> list[SavedOptimizer]:
    found = []
    for state in content.optimizers:
        groups, names = state["param_groups"], saved_names(state)
        ids = [index for group in groups for index in group["params"]]
        flat = [name for group in names for name in group] if names else [f"parameter {index}" for index in ids]
        named = dict(zip(ids, flat, strict=True))
        entries_of = list(state["state"].values())
        tensors = [value for entries in entries_of for value in entries.values()]
        found.append(
            SavedOptimizer(
                recipes=list(dict.fromkeys(group["recipe"] for group in groups if "recipe" in group)),
                learning_rates=list(dict.fromkeys(float(group["lr"]) for group in groups if "lr" in group)),
                parameters=len(ids),
                bytes=sum(value.nbytes for value in tensors if isinstance(value, Tensor)),
                weight_bits=sorted({16 + 8 * each[LOW_BITS].itemsize for each in entries_of if LOW_BITS in each}),
                blocks=[
                    block
                    for index, entries in state["state"].items()
                    for block in _blocks(named.get(index, str(index)), entries)
                ],
            )
        )
    return found


def _blocks(name: str, entries: Mapping[str, Any]) -> list[SavedBlock]:
    """Return the blocks of one parameter. In a fused one, keys start with the role and a dot."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in entries.items():
        if key not in OF_PARAMETERS and isinstance(value, Tensor):
            role, _, rest = key.rpartition(".")
            parts.setdefault(role, {})[rest] = value
    return [_block(f"{name}:{role}" if role else name, state) for role, state in (parts or {"": {}}).items()]


def _block(name: str, state: Mapping[str, Tensor]) -> SavedBlock:
    momentum = [kind for kind in map(MOMENTA.get, MOMENTA.names()) if kind.keys and state.keys() >= set(kind.keys)]
    second = [
        kind for kind in map(SECOND_MOMENTS.get, SECOND_MOMENTS.names()) if kind.keys and state.keys() >= set(kind.keys)
    ]
    known = {key for kind in (*momentum, *second) for key in kind.keys}
    unknown = [key for key in state if key not in known]
    rank = next((state[kind.keys[0]].shape[-1] for kind in momentum if "rank" in kind.options()), None)
    return SavedBlock(
        name=name,
        momentum=", ".join([*(kind.name for kind in momentum), *unknown]) or "none",
        rank=rank,
        second_moment=", ".join(kind.name for kind in second) or "none",
        bytes=sum(math.prod(value.shape) * value.element_size() for value in state.values()),
    )
