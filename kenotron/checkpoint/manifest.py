"""The manifest: what a checkpoint consists of, its JSON form, and every check that makes it safe to act on.

A manifest that ``read_manifest`` returns can be trusted with allocations: each tensor's pieces tile its shape, and
their byte ranges lie apart from one another inside files whose sizes were looked up. So nothing that is sized by it is
larger than what is really on the disk. Where the directory is one node's part, pieces leave holes, and loading checks
before it allocates.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint.boxes import Box, find_flaw, is_inside
from kenotron.checkpoint.errors import (
    FileMissingError,
    FileSizeError,
    ManifestDamagedError,
    NotACheckpointError,
    NotPublishedError,
    UnsafeFileNameError,
    VersionTooNewError,
)
from kenotron.checkpoint.format import CHUNK_BYTES, DTYPE_NAMES, DTYPES, FORMAT, MANIFEST, VERSION, unpublished_name
from kenotron.files import NotAFileError, open_regular, read_regular

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_SEAL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\n')
_SEAL_BYTES = len(',"crc32c":"01234567"}\n')
_MAX_EXTENT = 2**63 - 1
#: More than any tensor has, and so few that what takes time quadratic in them takes none.
_MAX_DIMS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    """A box of a global tensor and the bytes that hold it.

    Args:
        file: the name of the shard.
        begin: the first byte in the file. end: the byte after the last.
        offset: where the box begins in the global tensor. shape: its extents.
        crc32c: the CRC-32C of each ``CHUNK_BYTES`` from ``begin`` on, the last of which may be shorter.
    """

    file: str
    begin: int
    end: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32c: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Where it lies in the global tensor."""
        return Box(self.offset, self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return its form in the manifest."""
        return {
            "file": self.file,
            "bytes": [self.begin, self.end],
            "offset": list(self.offset),
            "shape": list(self.shape),
            "crc32c": list(self.crc32c),
        }

    @staticmethod
    def from_json(node: Mapping[str, Any]) -> StoredPiece:
        """Read the form that ``to_json`` returns."""
        begin, end = _integers(node["bytes"])
        return StoredPiece(
            file=_text(node["file"]),
            begin=begin,
            end=end,
            offset=_integers(node["offset"]),
            shape=_integers(node["shape"]),
            crc32c=_integers(node["crc32c"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A global tensor: its dtype, its shape and the pieces that tile it (none where it has no elements)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    def to_json(self) -> dict[str, Any]:
        """Return its form in the manifest."""
        return {
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
            "pieces": [piece.to_json() for piece in self.pieces],
        }

    @staticmethod
    def from_json(node: Mapping[str, Any]) -> StoredTensor:
        """Read the form that ``to_json`` returns."""
        return StoredTensor(
            dtype=DTYPES[node["dtype"]],
            shape=_integers(node["shape"]),
            pieces=tuple(StoredPiece.from_json(piece) for piece in node["pieces"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePart:
    """Whose part of a checkpoint a directory holds, where nodes share no file system.

    Args:
        index: of the node. count: of all nodes. ranks: of this node.
    """

    index: int
    count: int
    ranks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return its form in the manifest."""
        return {"index": self.index, "count": self.count, "ranks": list(self.ranks)}

    @staticmethod
    def from_json(node: Mapping[str, Any]) -> NodePart:
        """Read the form that ``to_json`` returns."""
        index, count = _integers([node["index"], node["count"]])
        return NodePart(index=index, count=count, ranks=_integers(node["ranks"]))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a checkpoint without reading its data.

    Args:
        path: the checkpoint's directory.
        save_id: names the save that wrote it.
        world_size: how many ranks wrote it.
        files: the size in bytes of each file beside the manifest.
        tensors: every stored tensor by its global name.
        state: the encoded shared state (``values.decode``).
        rank_states: the encoded state of each rank, None where it had none.
        aliases: further names of stored tensors (tied weights) -> the name that they are stored under.
        origins: shards that are linked to those of another checkpoint -> the ``save_id`` that their headers hold.
        is_merged: it was made of the parts of nodes, whose shards may hold more than is listed: the same boxes again.
        node: None where the directory holds everything; else it holds what this node's ranks have, and pieces leave holes.
    """

    path: Path
    save_id: str
    world_size: int
    files: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    state: Any
    rank_states: tuple[Any, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    is_merged: bool = False
    node: NodePart | None = None

    def to_bytes(self, tensors: str | None = None) -> bytes:
        """Return the content of ``manifest.json``, which ends in the checksum of all that precedes it.

        Args:
            tensors: their JSON, where that is at hand.
        """
        before = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": self.save_id,
            "world_size": self.world_size,
            "files": self.files,
        }
        after = {
            "state": self.state,
            "rank_states": self.rank_states,
            "aliases": self.aliases,
            **({"origins": self.origins} if self.origins else {}),
            **({"merged": True} if self.is_merged else {}),
            **({"node": self.node.to_json()} if self.node is not None else {}),
        }
        if tensors is None:
            tensors = to_text({name: tensor.to_json() for name, tensor in self.tensors.items()})
        content = f'{to_text(before)[:-1]},"tensors":{tensors},{to_text(after)[1:-1]}'.encode()
        return content + b',"crc32c":"%08x"}\n' % crc32c(content)


def to_text(node: Any) -> str:
    """Return JSON as a manifest has it: without spaces, and without what only Python takes for a number."""
    return json.dumps(node, separators=(",", ":"), allow_nan=False)


def head(save_id: str) -> bytes:
    """Return the bytes with which the manifest of this save begins: enough to tell who published it."""
    return f'{{"format":"{FORMAT}","version":{VERSION},"save_id":"{save_id}"'.encode()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tell whether a published checkpoint stands at ``path``, undamaged or not."""
    directory = Path(path).resolve()
    start = f'{{"format":"{FORMAT}",'.encode()
    try:
        with open_regular(directory / MANIFEST) as file:
            return unpublished_name(directory.name) is None and file.read(len(start)) == start
    except (FileNotFoundError, NotADirectoryError, NotAFileError):
        return False


def check_torch_file(path: str | os.PathLike[str]) -> None:
    """Raise ``NotACheckpointError`` where what stands at ``path`` does not begin as files of ``torch.save`` do."""
    if not Path(path).exists():
        return
    if Path(path).is_dir():
        _check_published(Path(path))
    try:
        start = read_regular(path, 4)
    except NotAFileError:
        raise NotACheckpointError(f"{path} is not a checkpoint: it is no regular file") from None
    if start != b"PK\x03\x04" and start[:1] != b"\x80":  # an archive; before torch 1.6 pickles
        raise NotACheckpointError(f"{path} is not a checkpoint: neither a directory of this format nor a file of torch.save's")


def read_manifest(path: str | os.PathLike[str], *, check_files: bool = True) -> Manifest:
    """Read and check the manifest of a published checkpoint.

    Args:
        path: the checkpoint's directory, or a link to it.
        check_files: look whether the other files are there with their sizes. A manifest without that is for telling what
            should be there.

    Raises:
        NotACheckpointError, NotPublishedError: there is no published checkpoint.
        VersionTooNewError: it was written in a later version of the format.
        ManifestDamagedError: its checksum fails, or it contradicts itself.
        FileMissingError, FileSizeError: another file is gone, or not as long as it was.
    """
    directory = Path(path)
    _check_published(directory)
    manifest = parse_manifest(read_regular(directory / MANIFEST), directory)
    if check_files:
        for name, num_bytes in manifest.files.items():
            check_file_size(directory / name, num_bytes)
    return manifest


def check_file_size(file: Path, num_bytes: int) -> None:
    """Raise ``FileMissingError`` or ``FileSizeError`` unless ``file`` is there with ``num_bytes`` bytes."""
    try:
        found = file.stat()
    except FileNotFoundError:
        raise FileMissingError(f"{file} is missing; the checkpoint cannot be loaded without it") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileMissingError(f"{file} is no file; the checkpoint cannot be loaded without it")
    if found.st_size != num_bytes:
        raise FileSizeError(f"{file} has {found.st_size} bytes and should have {num_bytes}; the checkpoint is incomplete")


def _check_published(directory: Path) -> None:
    if unpublished_name(directory.resolve().name):
        raise NotPublishedError(f"{directory} is what a save left that never came to its end; load another checkpoint")
    if is_checkpoint(directory):
        return
    if not directory.exists():
        begun = [other.name for other in directory.parent.glob(".*") if unpublished_name(other.name) == directory.name]
        if begun:
            raise NotPublishedError(
                f"{directory} does not exist: a save to it was begun and never came to its end ({', '.join(begun)}); "
                f"load another checkpoint"
            )
        raise NotACheckpointError(f"{directory} is not a checkpoint: there is no such file or folder")
    text = f"{directory} is not a checkpoint: no {MANIFEST} of the format {FORMAT!r} in it"
    inside = sorted(each.name for each in directory.iterdir() if is_checkpoint(each)) if directory.is_dir() else []
    if inside:
        text += f"; {len(inside)} are in it, of which one can be named: {', '.join(inside[-3:])}"
    raise NotACheckpointError(text)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Return the manifest that ``data`` holds, checked against itself but not against the files.

    Raises:
        VersionTooNewError, ManifestDamagedError (of which UnsafeFileNameError is one): see ``read_manifest``.
    """
    file = path / MANIFEST
    content, seal = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None or int(seal[1], 16) != crc32c(content):
        raise ManifestDamagedError(f"{file} is damaged: its checksum does not match; load another checkpoint")
    try:
        node = json.loads(data)
        version = node["version"]
        if type(version) is int and version > VERSION:
            raise VersionTooNewError(
                f"{file} has version {version} of the format and this Kénotron reads up to {VERSION}; upgrade it"
            )
        if node["format"] != FORMAT or type(version) is not int or version < 1:
            raise ManifestDamagedError(f"{file}: not a version of the format {FORMAT!r}")
        manifest = Manifest(
            path=path,
            save_id=_text(node["save_id"]),
            world_size=_integers([node["world_size"]])[0],
            files=dict(zip(node["files"], _integers(node["files"].values()), strict=True)),
            tensors={name: StoredTensor.from_json(tensor) for name, tensor in node["tensors"].items()},
            state=node["state"],
            rank_states=tuple(node["rank_states"]),
            aliases={_text(name): _text(stored) for name, stored in node.get("aliases", {}).items()},
            origins={_text(file): _text(save_id) for file, save_id in node.get("origins", {}).items()},
            is_merged=node.get("merged", False) is True,
            node=NodePart.from_json(node["node"]) if "node" in node else None,
        )
        _check(manifest)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        # Only a forgery gets here, since the checksum was right: whatever shape it has must end in one typed error.
        raise ManifestDamagedError(f"{file} contradicts itself: {type(error).__name__}: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ``ValueError`` or ``UnsafeFileNameError`` where the manifest's parts do not fit together."""
    for file in manifest.files:
        if not _FILE_NAME.fullmatch(file) or file == MANIFEST:
            raise UnsafeFileNameError(f"{manifest.path / MANIFEST} lists the file {file!r}, which is no plain name")
    for name, stored in manifest.aliases.items():
        if stored not in manifest.tensors or name in manifest.tensors:
            raise ValueError(f"{name!r} is an alias of {stored!r}, of which just the second must be stored")
    if not manifest.origins.keys() <= manifest.files.keys():
        raise ValueError(f"origins of files that are not listed: {manifest.origins!r:.200}")
    if len(manifest.rank_states) != manifest.world_size:
        raise ValueError(f"{len(manifest.rank_states)} rank states for a world of {manifest.world_size}")
    if manifest.node is not None:
        _check_node(manifest.node, manifest.world_size)
    for name, tensor in manifest.tensors.items():
        _check_tensor(name, tensor)
        flaw = None if manifest.node is not None else find_flaw([piece.box for piece in tensor.pieces], tensor.shape)
        if flaw is not None:
            raise ValueError(f"element {flaw[0]} of {name} is stored {flaw[1]} times")
    ranges: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            ranges[piece.file].append((piece.begin, piece.end, name))
    for file, spans in ranges.items():
        if file not in manifest.files:
            raise ValueError(f"pieces in the file {file!r}, which is not listed")
        spans.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
            if begin < end:
                raise ValueError(f"{name} and {other} share bytes of {file}")
        if spans[0][0] < 0 or spans[-1][1] > manifest.files[file]:
            raise ValueError(f"pieces outside of {file}")


def _check_tensor(name: str, tensor: StoredTensor) -> None:
    if not _is_possible(tensor.shape):
        raise ValueError(f"{name} cannot have the shape {tensor.shape[:8]}{' ...' if len(tensor.shape) > 8 else ''}")
    for piece in tensor.pieces:
        if not is_inside(piece.box, tensor.shape):
            raise ValueError(f"a piece of {name} at {piece.offset[:8]} lies outside of it")
        num_bytes = piece.box.volume * tensor.dtype.itemsize
        if num_bytes == 0 or piece.end - piece.begin != num_bytes:
            raise ValueError(f"a piece of {name} at {piece.offset} is not {num_bytes} bytes long")
        if len(piece.crc32c) != -(-num_bytes // CHUNK_BYTES):
            raise ValueError(f"a piece of {name} at {piece.offset} has {len(piece.crc32c)} checksums")
        if min(piece.crc32c) < 0 or max(piece.crc32c) >= 2**32:
            raise ValueError(f"a piece of {name} at {piece.offset} has a checksum that is none")


def _check_node(node: NodePart, world_size: int) -> None:
    if not 0 <= node.index < node.count or not node.ranks or not all(0 <= rank < world_size for rank in node.ranks):
        raise ValueError(f"node {node.index} of {node.count} with the ranks {node.ranks[:8]} in a world of {world_size}")


def _is_possible(shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor can have this shape; in no more steps than it has numbers, however large these are."""
    if len(shape) > _MAX_DIMS:
        return False
    extent = 1
    for size in shape:
        extent *= max(size, 1)
        if size < 0 or extent > _MAX_EXTENT:
            return False
    return True


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(values)
    if not {*map(type, found)} <= {int}:  # bool is no integer here
        raise TypeError(f"expected integers, found {found!r:.80}")
    return found


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"expected a text, found {value!r:.80}")
    return value
