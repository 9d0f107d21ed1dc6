"""Read torch's ``.metadata``, a pickle, without trusting it: it can import, call and build only what it needs."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_TORCHS = "torch.distributed.checkpoint"
# torch's classes that are replaced by records without behavior. Their fields are checked afterwards.
_RECORDS = {
    f"{_TORCHS}.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    ),
    f"{_TORCHS}.filesystem": ("_StorageInfo",),
}  # fmt: skip
# The opcodes that pickle writes for these. Others, such as PUT with a memo index, can allocate any amount of memory.
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS",
))  # fmt: skip
_PREFIXES = {pickletools.TAKEN_FROM_ARGUMENT1: -1, pickletools.TAKEN_FROM_ARGUMENT4U: -4}
# The bytes of an opcode's argument, or, negative, the bytes of the number that says how many follow that number.
_LENGTHS = {
    ord(opcode.code): _PREFIXES.get(opcode.arg.n, opcode.arg.n) if opcode.arg else 0
    for opcode in pickletools.opcodes
    if opcode.name in _OPCODES
}
_STOP = ord(".")
_MEMORY_FORMATS, _MOST_CELLS = 3, 10_000_000
_SEPARATORS = re.compile(r"[/\\\0]")


def parse_metadata(content: bytes) -> Metadata:
    """Return torch's metadata from the bytes of a ``.metadata`` file, without trusting them.

    Raises:
        pickle.UnpicklingError: If the pickle needs classes that a valid file does not contain.
        ValueError: If it is damaged, or torch's default planner did not write its fields.
    """
    try:
        if not _is_plain(content):
            for opcode, _, position in pickletools.genops(content):  # says what is wrong, and takes ten times as long
                if opcode.name not in _OPCODES:
                    raise ValueError(f"unexpected {opcode.name} at byte {position}")
        loaded = _Unpickler(io.BytesIO(content)).load()
    except _ForbiddenError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return _metadata(loaded)


def _is_plain(content: bytes) -> bool:
    """Return whether a pickle is complete and has no other opcodes than those of a valid file."""
    position, end = 0, len(content)
    while position < end:
        code = content[position]
        length = _LENGTHS.get(code)
        if length is None:
            return False
        position += 1
        if length < 0:
            length = int.from_bytes(content[position : position - length], "little") - length
        position += length
        if code == _STOP:
            return position <= end
    return False


class _ForbiddenError(pickle.UnpicklingError):
    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.UnpicklingError, self.args  # an error that other ranks can raise


class _Record:
    """Stands for one of torch's objects, and keeps the state from the pickle."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Creates new stand-in classes for every file, because a pickle can set attributes of classes."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._made: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return self._made.setdefault(name, type(name, (_Record,), {}))
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch.serialization", "_get_layout"): lambda name: name,
            (f"{_TORCHS}.metadata", "_MEM_FORMAT_ENCODING"): lambda number: number,
        }
        if (module, name) in known:
            return known[module, name]
        # The path where the checkpoint was saved, which is not used. Python 3.13 moved the classes.
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return lambda *parts: "/".join(map(str, parts))
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _ForbiddenError(f"it contains `{module}.{name}`, which no checkpoint needs")


# ---------------------------------------------------------------------- stand-ins → torch's objects


def _metadata(loaded: Any) -> Metadata:
    fields = _fields(loaded, "Metadata")
    entries = {_text(key): _storage(value) for key, value in _mapping(fields, "state_dict_metadata").items()}
    if fields.get("planner_data") is None or fields.get("storage_data") is None:
        raise ValueError(
            "it does not say where weights and optimizer states are, so torch.distributed.checkpoint did not write it "
            "with its default planner"
        )
    places = {_text(key): _place(value, entries) for key, value in _mapping(fields, "planner_data").items()}
    infos = dict(_info(key, value) for key, value in _mapping(fields, "storage_data").items())
    for key, entry in entries.items():
        if key not in places:
            raise ValueError(f"it has no place for {key!r}")
        for position in _positions(key, entry):
            if position not in infos:
                raise ValueError(f"it does not say which file holds {key!r}")
    return Metadata(entries, places, infos)


def _storage(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _Record) and type(value).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    properties = getattr(fields.get("properties"), "state", None)
    if not isinstance(properties, tuple) or len(properties) != 5 or not isinstance(properties[0], torch.dtype):
        raise ValueError("a tensor has no dtype")
    dtype, layout, requires_grad, memory_format, _ = properties
    if layout != "torch.strided" or memory_format not in range(_MEMORY_FORMATS):
        raise ValueError(
            f"a tensor has the layout {reprlib.repr(layout)} and the memory format {reprlib.repr(memory_format)}"
        )
    size = _size(fields.get("size"))
    chunks = [_chunk(chunk, size) for chunk in _list(fields, "chunks")]
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError(f"the parts of a tensor of shape {tuple(size)} do not add up to it")
    if len(chunks) > 1 and _overlap(chunks):
        raise ValueError(f"parts of a tensor of shape {tuple(size)} overlap")
    return TensorStorageMetadata(TensorProperties(dtype=dtype, requires_grad=bool(requires_grad)), size, chunks)


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Return whether two parts share an element, by counting the cells of the grid that their edges form."""
    boxes = [[(start, start + size) for start, size in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
    edges = [sorted({edge for span in spans for edge in span}) for spans in zip(*boxes, strict=True)]
    if math.prod(map(len, edges)) > _MOST_CELLS:
        raise ValueError(f"it cuts a tensor into {len(chunks)} parts that do not form a grid")
    cells = [{edge: cell for cell, edge in enumerate(each)} for each in edges]
    covered = torch.zeros([len(each) for each in edges], dtype=torch.int16)
    for box in boxes:
        covered[tuple(slice(cell[start], cell[end]) for cell, (start, end) in zip(cells, box, strict=True))] += 1
    return bool((covered > 1).any())


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(
        start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise ValueError(f"a part of a tensor of shape {tuple(size)} lies outside of it")
    return ChunkStorageMetadata(offsets, sizes)


def _positions(key: str, entry: TensorStorageMetadata | BytesStorageMetadata) -> list[MetadataIndex]:
    if isinstance(entry, BytesStorageMetadata):
        return [MetadataIndex(key)]
    return [MetadataIndex(key, chunk.offsets) for chunk in entry.chunks]


def _place(value: Any, entries: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return the keys and positions under which the nested state dict holds an entry."""
    place = tuple(value) if isinstance(value, tuple | list) else (value,)
    for step in place:
        # A position indexes a list, which is extended to that length.
        if not isinstance(step, str) and not (isinstance(step, int) and 0 <= step <= len(entries)):
            raise ValueError(f"it has the place {reprlib.repr(place)}")
    if not place:
        raise ValueError("it has a place without a name")
    return place


def _info(key: Any, value: Any) -> tuple[MetadataIndex, _StorageInfo]:
    index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
    offset, number = index.get("offset"), index.get("index")
    name, start, length = _text(info.get("relative_path")), info.get("offset"), info.get("length")
    if _SEPARATORS.search(name) or name in ("", ".", ".."):
        raise ValueError(f"it names the file {name!r}, which is not in the directory of the checkpoint")
    if info.get("transform_descriptors"):
        raise ValueError(f"{name!r} was written through the extensions {reprlib.repr(info['transform_descriptors'])}")
    if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
        raise ValueError(
            f"it places an entry of {name!r} at {reprlib.repr(start)} with the length {reprlib.repr(length)}"
        )
    if number is not None and not isinstance(number, int):
        raise ValueError(f"it numbers a part with {reprlib.repr(number)}")
    where = None if offset is None else _size(offset)
    return MetadataIndex(_text(index.get("fqn")), where, number), _StorageInfo(name, start, length)  # type: ignore[arg-type]


def _fields(value: Any, kind: str) -> dict[str, Any]:
    state = value.state if isinstance(value, _Record) and type(value).__name__ == kind else None
    if not isinstance(state, dict):
        raise ValueError(f"it has {type(value).__name__} in place of {kind}")
    return state


def _mapping(fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
    if not isinstance(fields.get(name), dict):
        raise ValueError(f"{name!r} is not a mapping")
    return fields[name]


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(fields.get(name), list):
        raise ValueError(f"{name!r} is not a list")
    return fields[name]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it has {reprlib.repr(value)} in place of a name")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(isinstance(length, int) and length >= 0 for length in value):
        raise ValueError(f"it has {reprlib.repr(value)} in place of a shape")
    return torch.Size(value)
