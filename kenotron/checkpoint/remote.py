"""Checkpoints in a folder of any file system that fsspec knows: sent file by file, published by their manifest.

1. What stands under the same name from another save loses its manifest: from now on nobody loads it.
2. All files are sent, and each must arrive with its size.
3. The manifest is sent. An object of an object store is there whole or not at all.
4. ``uploads.json``, the list of what was sent, oldest first, is replaced. Only what it names is ever removed.

One process sends to a folder. Nothing here waits for another rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from kenotron.checkpoint.errors import NotACheckpointError
from kenotron.checkpoint.format import MANIFEST, unpublished
from kenotron.checkpoint.manifest import is_checkpoint, parse_manifest, read_manifest
from kenotron.checkpoint.meeting import FolderLock
from kenotron.checkpoint.save import check_replaceable, publish_alone
from kenotron.durable import fsync
from kenotron.files import read_regular

_INDEX = "uploads.json"


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


class _Bytes(NamedTuple):
    """A file's bytes on this machine, whatever its names."""

    device: int
    inode: int
    size: int
    changed_ns: int


class RemoteFolder:
    """A folder of checkpoints somewhere. Nothing is asked of it before it is used.

    Args:
        url: such as ``s3://bucket/run``, or any other that fsspec knows.

    Raises:
        ValueError: no URL, or a protocol that fsspec does not know.
        ImportError: what this protocol takes is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol, separator, _ = self.url.partition("://")
        if not separator:
            raise ValueError(f"{url!r} is no URL. Name the protocol: 's3://bucket/run', 'file:///mnt/backup/run'.")
        try:
            self._core: Any = importlib.import_module("fsspec.core")
        except ImportError as error:
            raise ImportError(f"Checkpoints at {protocol}:// take fsspec: pip install 'kenotron[data]' ({error})") from error
        registry = importlib.import_module("fsspec")
        try:
            registry.get_filesystem_class(protocol)
        except ValueError:
            known = ", ".join(sorted(registry.available_protocols()))
            raise ValueError(f"{url}: fsspec knows no {protocol}://. It knows {known}.") from None
        except ImportError as error:
            raise ImportError(f"{url}: fsspec lacks what {protocol}:// takes. {error}") from error
        self._sent: set[tuple[str, str]] = set()  # (save id, file), so that a retry sends the rest alone
        self._arrived: dict[_Bytes, str] = {}  # what was sent, and where it is: hard links of it are copied there

    def _place(self, *names: str) -> tuple[Any, str]:
        for name in names:
            if not _is_plain(name):  # what it leads to lies outside of the folder
                raise ValueError(f"{name!r} is no name of something in {self.url}")
        filesystem, root = self._core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        return filesystem, "/".join([root.rstrip("/"), *names])

    def names(self) -> list[str]:
        """Return the published checkpoints that were sent here, the last one at the end."""
        return [name for name in self._index() if self.save_id(name) is not None]

    def save_id(self, name: str) -> str | None:
        """Return which save is published under a name; ``None``: none is."""
        start = self._read(name, MANIFEST, end=200)
        if start is None:
            return None
        return start.decode("ascii", "replace").partition('"save_id":"')[2].partition('"')[0] or None

    def send(self, path: Path) -> int:
        """Send a published checkpoint under its name, unless it is here; return the number of bytes.

        Raises:
            CheckpointError, OSError: it is not there, or not any more. What the file system raises goes through.
        """
        manifest = read_manifest(path)
        if self.save_id(path.name) == manifest.save_id:
            return 0
        filesystem, folder = self._place(path.name)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(f"{folder}/{MANIFEST}")
        filesystem.makedirs(folder, exist_ok=True)
        num_bytes = 0
        for file in sorted(file for file in path.iterdir() if file.is_file() and file.name != MANIFEST):
            num_bytes += self._send_file(file, filesystem, f"{folder}/{file.name}", manifest.save_id)
        content = read_regular(path / MANIFEST)
        if parse_manifest(content, path).save_id != manifest.save_id:
            raise OSError(f"{path} was replaced while it was sent")
        filesystem.pipe_file(f"{folder}/{MANIFEST}", content)
        self._write_index([*(name for name in self._index() if name != path.name), path.name])
        self._sent = {sent for sent in self._sent if sent[0] != manifest.save_id}
        return num_bytes

    def _send_file(self, file: Path, filesystem: Any, target: str, save_id: str) -> int:
        found = file.stat()
        size, bytes_here = found.st_size, _Bytes(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if (save_id, file.name) in self._sent:
            return size
        is_copied = self._copy(bytes_here, filesystem, target)
        self._arrived = {key: place for key, place in self._arrived.items() if place != target}  # which is overwritten
        if not is_copied:
            filesystem.put_file(str(file), target)
            arrived = filesystem.size(target)
            if arrived != size:
                raise OSError(f"{self.url}: {file.name} has {arrived} bytes there and {size} here")
        self._sent.add((save_id, file.name))
        self._arrived.setdefault(bytes_here, target)
        return 0 if is_copied else size

    def _copy(self, bytes_here: _Bytes, filesystem: Any, target: str) -> bool:
        """Copy what is at the URL already, as of ``last`` the files of the step that it equals. False: it has to be sent."""
        source = self._arrived.get(bytes_here)
        if source is None or source == target:
            return False
        try:
            filesystem.cp_file(source, target)
            return bool(filesystem.size(target) == bytes_here.size)
        except (OSError, NotImplementedError):  # removed there meanwhile, or a file system that can't
            return False

    def remove(self, name: str) -> None:
        """Remove a checkpoint: first its manifest, so that no half of it is ever loaded."""
        filesystem, folder = self._place(name)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(f"{folder}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(folder, recursive=True)
        self._write_index([each for each in self._index() if each != name])

    def fetch(self, out: str | os.PathLike[str], name: str | None = None) -> Path:
        """Bring a checkpoint to this machine, published as any other; return where.

        Args:
            out: the checkpoint to make; where it is there already, nothing is done. name: in the folder; the last by default.

        Raises:
            NotACheckpointError: there is none.
            ValueError: something else stands at ``out``.
        """
        path = Path(os.path.abspath(out))
        names = self.names() if name is None else [name]
        save_id = self.save_id(names[-1]) if names else None
        if save_id is None:
            raise NotACheckpointError(f"{self.url} holds no published checkpoint{'' if name is None else f' {name}'}")
        if is_checkpoint(path) and read_manifest(path).save_id == save_id:
            return path
        check_replaceable(path)
        filesystem, folder = self._place(names[-1])
        manifest = parse_manifest(filesystem.cat_file(f"{folder}/{MANIFEST}"), path)
        lock = FolderLock(unpublished(path, manifest.save_id))
        for file in manifest.files:
            filesystem.get_file(f"{folder}/{file}", str(lock.folder / file))
            fsync(lock.folder / file)
        publish_alone(manifest, lock)
        return path

    def _index(self) -> list[str]:
        names = json.loads(self._read(_INDEX) or b"[]")
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise ValueError(f"{self.url}/{_INDEX} is no list of names of checkpoints: remove it, or choose another folder")
        return names

    def _read(self, *names: str, end: int | None = None) -> bytes | None:
        """Return the first bytes of a file, or all; ``None``: there is none. ``exists`` would take any error for that."""
        filesystem, path = self._place(*names)
        try:
            content: bytes = filesystem.cat_file(path, start=0, end=end)
        except FileNotFoundError:
            return None
        return content

    def _write_index(self, names: list[str]) -> None:
        filesystem, index = self._place(_INDEX)
        filesystem.pipe_file(index, json.dumps(names).encode())
