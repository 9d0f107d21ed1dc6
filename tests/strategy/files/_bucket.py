"""An object store in a folder: names without folders, objects that appear at once, no rename. Processes share it."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """``bucket://NAME/...`` lies in :attr:`root`, an object per file."""

    protocol = "bucket"
    cachable = False
    root = Path()
    before: Any = staticmethod(lambda operation: None)  # called before every operation that changes something

    def _file(self, path: str) -> Path:
        return self.root / quote(self._strip_protocol(path), safe="")

    def _keys(self) -> dict[str, Path]:
        return {unquote(entry.name): entry for entry in self.root.iterdir() if not entry.name.startswith(".")}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found: dict[str, dict[str, Any]] = {}
        for key, file in self._keys().items():
            if key == path or key.startswith(f"{path}/"):
                name = "/".join(key.split("/")[: path.count("/") + 2]) if key != path else key
                if name == key:
                    facts = file.stat()  # inode numbers alone are soon reused
                    changed = facts.st_ino, facts.st_ctime_ns
                    found[name] = {"name": name, "size": facts.st_size, "type": "file", "changed": changed}
                else:
                    found.setdefault(name, {"name": name, "size": 0, "type": "directory"})
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self._file(path).read_bytes())
        assert mode == "wb"
        return Upload(self, path, options.get("autocommit", True))

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        type(self).before("copy")
        copy = self.root / f".copy-{os.getpid()}"  # several processes share the store
        shutil.copyfile(self._file(path1), copy)
        os.replace(copy, self._file(path2))

    def _rm(self, path: str) -> None:
        type(self).before("remove")
        self._file(path).unlink()

    def rm_file(self, path: str) -> None:
        self._rm(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for name in self.find(path):
            self._rm(name)


class Upload(io.BytesIO):
    """An object that is there when it is closed, or, in a transaction, when that ends."""

    def __init__(self, bucket: Bucket, path: str, at_once: bool) -> None:
        super().__init__()
        self.bucket, self.path, self.at_once, self.content = bucket, path, at_once, b""

    def close(self) -> None:
        if not self.closed:
            self.content = self.getvalue()
            super().close()
            if self.at_once:
                self.commit()

    def commit(self) -> None:
        type(self.bucket).before("put")
        part = self.bucket.root / f".{os.getpid()}"
        part.write_bytes(self.content)
        os.replace(part, self.bucket._file(self.path))

    def discard(self) -> None:
        pass


fsspec.register_implementation("bucket", Bucket, clobber=True)
