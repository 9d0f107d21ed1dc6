"""Reads the name of a parameter: without wrappers, as segments, and for the words and containers in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# What peft and torch's parametrizations put between a layer and its weight.
_AROUND_WEIGHTS = {"base_layer", "original_module", "parametrizations"}
_WEIGHTS = {"weight", "weight_v", "weight_g", "original", "original0", "original1"}
_ADAPTER = re.compile(r"^(lora_(A|B|embedding_A|embedding_B)|hada_\w+|lokr_\w+)$")  # LoRA, LoHa, LoKr
_NUMBERED = re.compile(r"(^|_)\d+$")
_VECTOR = re.compile(r"(^|_)bias(_[uv])?$|norm\d*$|^ln(_|\d|$)")
_CONTAINERS = (
    # Which choose keys and have their own queries; scales and shifts of norms that depend on an input.
    ("linear", re.compile(r"^(indexer|compressor|ada_?(\w*_)?norm\w*)$")),
    ("router", re.compile(r"^(\w*router\w*|gate|gating)$")),
    ("mlp", re.compile(r"^(?!.*bias)(\w*mlp\w*|ff(n|wd)?|ff_\w+|feed_?forward|\w*experts?|densereludense"
                       r"|(\w+_)?inter(mediate)?(_query)?|block_sparse_moe|moe)$")),
    ("attention", re.compile(r"att(n|ention)|_att$|^mha$|^self$|^sa$")),
)  # fmt: skip


def canonical_names(names: Iterable[str]) -> list[str]:
    """Strip the prefixes that ``torch.compile``, DDP, FSDP, Fabric and activation checkpointing add to parameter names.

    DDP's ``module.`` is stripped as often as all names start with it. Names that are already canonical do not change.
    """
    bare = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    while bare and all(len(parts) > 1 and parts[0] == "module" for parts in bare):
        bare = [parts[1:] for parts in bare]
    return [".".join(parts) for parts in bare]


@dataclass(frozen=True)
class Place:
    """Where a parameter is in its model, read off its name.

    Attributes:
        word: The last segment that says anything: neither ``weight`` nor a number.
        parent: The segment before it.
        container: ``attention``, ``mlp``, ``router`` or ``linear``: what the nearest segment before it stands for that
            stands for any.
        in_layer: Whether a numbered layer contains it, such as ``layers.0`` or ``encoder_layer_0``.
        numbered: Whether a number follows the word.
        adapter: The segment that marks a low-rank adapter, or nothing.
        vector: Whether the name is that of a bias or norm, whatever its shape.
        raw: Whether it is no layer's weight, but a parameter of its own.
        path: The segments without ``weight`` and what wrappers add.
    """

    word: str
    parent: str
    container: str
    in_layer: bool
    numbered: bool
    adapter: str
    vector: bool
    raw: bool
    path: tuple[str, ...]


@lru_cache(maxsize=4096)
def place(name: str) -> Place:
    """Return where the parameter with a canonical name is."""
    segments = _bare(name.split("."))
    adapter = next((segment for segment in segments if _ADAPTER.search(segment)), "")
    raw = segments[-1] if segments else ""
    while segments and segments[-1] in _WEIGHTS:
        segments = segments[:-1]
    path = tuple(segments)
    while segments and segments[-1].isdigit():
        segments = segments[:-1]
    word = segments[-1] if segments else ""
    above = segments[:-1]
    container = next(filter(None, map(container_of, reversed(above))), "")
    vector = bool(_VECTOR.search(word.lower()) or _VECTOR.search(raw.lower()))
    parent = above[-1] if above else ""
    in_layer, numbered = any(map(_NUMBERED.search, above)), len(segments) < len(path)
    return Place(word, parent, container, in_layer, numbered, adapter, vector, raw not in _WEIGHTS, path)


@lru_cache(maxsize=4096)
def container_of(segment: str) -> str:
    """Return what a segment of a name contains: ``attention``, ``mlp``, ``router``, ``linear``, or nothing."""
    segment = segment.lower()
    return next((name for name, pattern in _CONTAINERS if pattern.search(segment)), "")


def _bare(segments: list[str]) -> list[str]:
    """Drop what adapters and parametrizations add."""
    found: list[str] = []
    skip = False
    for segment in segments:
        if not skip and segment not in _AROUND_WEIGHTS and segment != "modules_to_save":
            found.append(segment)
        skip = segment == "modules_to_save"  # the name of an adapter follows
    return found
