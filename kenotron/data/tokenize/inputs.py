"""What is to be tokenised: the files that inputs stand for, and how they are cut into shards.

The cut depends on the names and sizes of the files alone, so that it is the same for any number of workers, and after a kill.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

#: By the end of a name: how its documents are found. Everything else is plain text, one document a file.
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
#: A shard is about 1/256 of all bytes, and within these limits: enough for many workers, not too many for a file system.
_SMALLEST_SHARD, _LARGEST_SHARD = 4 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to tokenise.

    Attributes:
        name: how people call it: a path or a URL. filesystem, path: where fsspec finds it. size: bytes. stamp: changes when the
            file does, as far as its file system tells. kind: "jsonl", "parquet" or "text". compression: "gz", "zst" or "".
    """

    name: str
    filesystem: Any
    path: str
    size: int
    stamp: str
    kind: str
    compression: str

    @property
    def is_cuttable(self) -> bool:
        """Whether several workers may read parts of it."""
        return self.kind == "parquet" or (self.kind == "jsonl" and not self.compression)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The documents of a file that begin in bytes ``[start, stop)``: lines, or row groups of Parquet."""

    file: InputFile
    start: int
    stop: int


def needed(module: str, purpose: str) -> ModuleType:
    """Import what the extra ``data`` brings; ``ImportError`` says so where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} takes {module.split('.')[0]}: pip install 'kenotron[data]' ({error})") from error


def find_inputs(inputs: str | Path | Sequence[str | Path], out: Path) -> list[InputFile]:
    """Return the files that inputs stand for, those of a folder sorted by name.

    Args:
        inputs: files, folders, globs; paths or URLs of fsspec. out: nothing in it is an input.

    Raises:
        ValueError: an input stands for no file, a file is named twice, or ``out`` is itself an input.
    """
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if not paths:
        raise ValueError("There is no input. Name at least one file, folder or URL.")
    files: list[InputFile] = []
    for path in paths:
        files += _files_of(str(path), out)
    seen: set[str] = set()
    for file in files:
        if file.name in seen:
            raise ValueError(f"{file.name} is named twice. Name it once.")
        seen.add(file.name)
    return files


def _files_of(path: str, out: Path) -> list[InputFile]:
    core = needed("fsspec.core", "Reading inputs")
    filesystem, place = core.url_to_fs(os.path.expanduser(path))
    is_local = "file" in _protocols(filesystem)
    if is_local and os.path.realpath(place) == os.path.realpath(out):
        raise ValueError(f"{path} is where the tokens go. Write them to another place.")
    if filesystem.isfile(place):
        return [_input_file(filesystem, place, filesystem.info(place), is_local)]
    if filesystem.isdir(place):
        root, found = place, filesystem.find(place, detail=True)
    elif glob.has_magic(place):
        root = glob.escape(place).split("[")[0].rpartition("/")[0]  # the folder above the first wildcard
        found = {name: info for name, info in filesystem.glob(place, detail=True).items() if info["type"] == "file"}
    else:
        raise ValueError(f"{path}: there is no such file or folder.")
    if not _is_hidden(place[len(root) :]):  # a glob may ask for what is hidden
        found = {name: info for name, info in found.items() if not _is_hidden(name[len(root) :])}
    if is_local:
        outside = os.path.realpath(out) + os.sep
        found = {name: info for name, info in found.items() if not os.path.realpath(name).startswith(outside)}
    if not found:
        raise ValueError(f"{path}: {'nothing matches' if glob.has_magic(place) else 'no file is in it'}.")
    return [_input_file(filesystem, name, found[name], is_local) for name in sorted(found)]


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _input_file(filesystem: Any, path: str, info: dict[str, Any], is_local: bool) -> InputFile:
    name = path if is_local else filesystem.unstrip_protocol(path)
    size = info.get("size")
    if size is None:
        raise ValueError(f"{name}: its server does not tell its size. Copy it to a disk first.")
    stem, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = _KINDS.get(suffix, "text")
    if kind == "parquet" and compression:
        raise ValueError(f"{name}: Parquet is compressed within. Unpack it first.")
    stamps = (info.get(key) for key in ("mtime", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "updated"))
    stamp = next((str(stamp) for stamp in stamps if stamp is not None), "")
    return InputFile(
        name=name, filesystem=filesystem, path=path, size=int(size), stamp=stamp, kind=kind, compression=compression
    )


def digest_of(files: Sequence[InputFile]) -> str:
    """Return what changes when any input does, or their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def shard_bytes_of(files: Sequence[InputFile]) -> int:
    """Return how many bytes of input make a shard, where the user does not say."""
    return min(max(sum(file.size for file in files) // 256, _SMALLEST_SHARD), _LARGEST_SHARD)


def cut(files: Sequence[InputFile], shard_bytes: int) -> list[list[Piece]]:
    """Cut inputs into shards of about as many bytes, in their order. Only what can't be cut makes one larger."""
    shards: list[list[Piece]] = [[]]
    room = shard_bytes
    for file in files:
        start = 0
        while start < file.size or start == 0:
            if room <= 0:
                shards.append([])
                room = shard_bytes
            stop = min(start + room, file.size) if file.is_cuttable else file.size
            shards[-1].append(Piece(file=file, start=start, stop=stop))
            # An empty file has its piece as well: that it is empty is for the reader to tell.
            room -= max(stop - start, 1)
            start = max(stop, 1)
    return shards
