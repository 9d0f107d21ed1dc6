"""An open checkpoint directory: all ranks read one save, which is checked before it is used."""

from __future__ import annotations

import errno
import hashlib
import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from lightning_memopt._registry import listed
from lightning_memopt.strategy.files.atomic import current
from lightning_memopt.strategy.files.checksums import Checksum, checksum, parsed
from lightning_memopt.strategy.files.directory import CHECKSUMS, INDEX, REST, SAMPLED, SAVE, SHARDS, is_checkpoint
from lightning_memopt.strategy.files.folders import Folder, open_folder, whole_size
from lightning_memopt.strategy.files.metadata import parse_metadata
from lightning_memopt.strategy.files.opened_file import naming, verify_zip
from lightning_memopt.strategy.files.places import Place, inside
from lightning_memopt.strategy.files.remote import PARTS


class OpenedDirectory:
    """All files of a checkpoint directory, opened once through one descriptor.

    Attributes:
        path: The path under which it was opened.
        identity: Identifies this save; equal on all ranks that opened the same save.
        index: torch's metadata: keys, shapes, dtypes and locations.
        rest: The checkpoint without weights and optimizer states.
    """

    def __init__(self, path: Place, *, weights_only: bool | None = None, verify: bool = True) -> None:
        """Open a directory, and read everything except weights and optimizer states.

        Args:
            path: The directory, or its URL.
            weights_only: As in ``torch.load``, for entries that are not tensors.
            verify: Whether to compare checksums, here and in :meth:`check`.

        Raises:
            ValueError: If a file is missing or damaged; the message names it.
            pickle.UnpicklingError: If a file contains objects that are not allowed.
        """
        self.path = path
        self._weights_only, self._verify = weights_only, verify
        self._files: dict[str, IO[bytes]] = {}
        self._folder: Folder = open_folder(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        rest = self._required(REST)
        self.rest = self._parse_rest(rest)
        if PARTS in self.rest:
            self._enter(self.rest.pop(PARTS))
        index = self._required(INDEX)
        self.identity = hashlib.blake2b(rest + index, digest_size=16).hexdigest()
        self._checksums: dict[str, Checksum] | None = None
        with naming(inside(self.path, REST)):
            if CHECKSUMS in self.rest:
                self._checksums = parsed(self.rest.pop(CHECKSUMS))
        self.rest.pop(SAMPLED, None)
        if self._verify and INDEX in (self._checksums or {}):
            self._compare(INDEX)
        with naming(inside(self.path, INDEX)):
            self.index: Metadata = parse_metadata(index)
        for name in {*self._ends(), *(self._checksums or {})}:
            if name not in self._files:
                self._open_shard(name)

    def _required(self, name: str) -> bytes:
        try:
            self._open(name)
        except FileNotFoundError:
            raise ValueError(
                f"The path {str(self.path)!r} does not point to a valid checkpoint: {name!r} is missing. Either "
                f"only a part of it was copied, or it is a folder of checkpoints{self._checkpoints_inside()}."
            ) from None
        return self._files[name].read()

    def _enter(self, save: Any) -> None:
        """Continue in the folder of the current save, as on file systems that cannot rename."""
        if not isinstance(save, str) or not SAVE.fullmatch(save):
            raise ValueError(f"{str(inside(self.path, REST))!r} is damaged: it names the folder {save!r:.200}.")
        outer = self._folder
        try:
            self._folder = outer.inside(save)
        except FileNotFoundError:
            raise ValueError(
                f"The checkpoint {str(self.path)!r} is not complete: its folder {save!r} is missing. Use another "
                "checkpoint."
            ) from None
        outer.close()

    def _checkpoints_inside(self) -> str:
        if not isinstance(self.path, Path):
            return ""
        entries = sorted(current(self.path).iterdir())
        found = [entry.name for entry in entries if is_checkpoint(entry) or entry.suffix == ".ckpt"]
        return f" ({listed(list(map(repr, found)), 3)})" if found else ""

    def _parse_rest(self, content: bytes) -> dict[str, Any]:
        path = inside(self.path, REST)
        if not content.startswith(b"PK\x03\x04"):
            raise ValueError(f"{str(path)!r} is not a checkpoint: it is empty, or torch.save did not write it.")
        stream = io.BytesIO(content)
        with naming(path, stream):
            if self._verify:
                verify_zip(stream)
            stream.seek(0)
            rest = torch.load(stream, map_location="cpu", weights_only=self._weights_only)
            if not isinstance(rest, dict):
                raise TypeError(f"expected a mapping, found {type(rest).__name__}")
        return rest

    def _open(self, name: str) -> None:
        self._files[name] = self._folder.open(name)

    def _open_shard(self, name: str) -> None:
        try:
            self._open(name)
        except FileNotFoundError:
            raise ValueError(
                f"The checkpoint {str(self.path)!r} is not complete: {name!r} is missing. All ranks must save to, and "
                "load from, a file system that they share; otherwise use another checkpoint."
            ) from None
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise OSError(
                    error.errno,
                    f"the checkpoint has {len(self._ends())} files, and this process may not open that many: raise "
                    "the limit with `ulimit -n`",
                    str(self.path),
                ) from error
            raise

    # ------------------------------------------------------------------ checking

    def check(self, share: tuple[int, int]) -> None:
        """Check that all files are complete and belong to one save.

        Args:
            share: This rank's position and the number of ranks that share the reading.

        Raises:
            ValueError: If a file is truncated, damaged or from another save; the message names it.
        """
        rank, ranks = share
        with self._still_there():
            self._check_sizes()
        if self._verify:
            self._warn_of_missing_checksums(rank)
            for name in sorted(self._checksums or {})[rank::ranks]:
                self._compare(name)

    @property
    def has_checksums(self) -> bool:
        """Whether the directory has checksums."""
        return self._checksums is not None

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file of the checkpoint."""
        return {name: whole_size(stream) for name, stream in sorted(self._files.items())}

    def _check_sizes(self) -> None:
        ends = self._ends()
        known = {**ends, **{name: size for name, (size, _) in (self._checksums or {}).items()}}
        for name, expected in known.items():
            size = whole_size(self._files[name])
            if size < expected:
                raise ValueError(
                    f"The checkpoint {str(self.path)!r} is not complete: {name!r} is truncated or from another save, "
                    f"it has {size} of {expected} bytes. Use another checkpoint."
                )
            if size > expected:
                raise self._mixed(name, f"it has {size} bytes, {expected} were saved")
            if ends.get(name, 0) > expected:
                raise self._mixed(name, f"{INDEX!r} says that it has {ends[name]} bytes")
        for name in sorted(self._folder.names()):
            # torch writes an empty file if a rank has nothing to save.
            if SHARDS.fullmatch(name) and name not in known and self._folder.size(name):
                raise self._mixed(name, f"{INDEX!r} does not list it. Remove it if you want to use the others")

    def _compare(self, name: str) -> None:
        assert self._checksums is not None
        with self._still_there():
            found = checksum(self._files[name])
        if found != self._checksums[name]:
            raise ValueError(
                f"The checkpoint {str(self.path)!r} is damaged: {name!r} does not match its checksum in {REST!r} (it "
                "has changed, or is from another save). Use another checkpoint."
            )

    def _warn_of_missing_checksums(self, rank: int) -> None:
        if self._checksums is None and rank == 0:
            warnings.warn(
                f"The checkpoint {str(self.path)!r} has no checksums, because another tool or an earlier version saved "
                "it: a flipped bit would not be noticed.",
                stacklevel=2,
            )

    def _mixed(self, name: str, why: str) -> ValueError:
        return ValueError(
            f"The checkpoint {str(self.path)!r} mixes files of different saves: {name!r} is from another one ({why}). "
            "Use another checkpoint."
        )

    def _ends(self) -> dict[str, int]:
        """Return the minimum size of every rank's file."""
        ends: dict[str, int] = {}
        for info in self.index.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        return ends

    # ------------------------------------------------------------------ reading

    def object(self, key: str) -> Any:
        """Return the value of a key that is not a tensor.

        Raises:
            ValueError: If it is damaged.
            pickle.UnpicklingError: If it contains objects that are not allowed.
        """
        return self._load(MetadataIndex(key), self._weights_only)

    def tensor(self, index: MetadataIndex) -> Tensor:
        """Return a part of a tensor, as it was saved.

        Raises:
            ValueError: If it is damaged, or does not match the index.
            pickle.UnpicklingError: If it is not a tensor.
        """
        value = self._load(index, True)
        entry = self.index.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == index.offset)
        if (
            not isinstance(value, Tensor)
            or value.layout is not torch.strided
            or (value.shape, value.dtype) != (chunk.sizes, entry.properties.dtype)
        ):
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise self._mixed(
                self.index.storage_data[index].relative_path,
                f"{index.fqn!r} is {found} there, and {entry.properties.dtype} {tuple(chunk.sizes)} in {INDEX!r}",
            )
        return value

    def whole(self, key: str) -> Any:
        """Return the value of a key: an object, or a tensor assembled from its parts.

        Raises:
            ValueError: As for :meth:`tensor`.
            pickle.UnpicklingError: As for :meth:`object`.
        """
        entry = self.index.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):
            return self.object(key)
        with naming(inside(self.path, INDEX)):  # the shape may be invalid
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            part = value
            for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, start, length)
            part.copy_(self.tensor(MetadataIndex(key, chunk.offsets)))
        return value

    def _load(self, index: MetadataIndex, weights_only: bool | None) -> Any:
        info = self.index.storage_data[index]
        stream = self.stream(index)
        with naming(inside(self.path, info.relative_path), stream):
            return torch.load(stream, map_location="cpu", weights_only=weights_only)

    def stream(self, index: MetadataIndex) -> IO[bytes]:
        """Return the saved bytes of a key, or of a part of a tensor, in the format of ``torch.save``."""
        info = self.index.storage_data[index]
        stream = self._files[info.relative_path]
        stream.seek(info.offset)
        with self._still_there():
            return io.BytesIO(stream.read(info.length))

    @contextmanager
    def _still_there(self) -> Generator[None, None, None]:
        """Say what has happened if a remote file is gone. Local files that are open stay."""
        try:
            yield
        except FileNotFoundError as error:
            raise ValueError(
                f"The checkpoint {str(self.path)!r} was replaced or removed while it was read ({error}). Nothing was "
                "loaded; load it again."
            ) from error

    def close(self) -> None:
        """Close all files."""
        for stream in self._files.values():
            stream.close()
        self._folder.close()
