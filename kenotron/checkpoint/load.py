"""Load a checkpoint: any layout to any layout, reading only the byte ranges that are wanted, and checking each of them.

1. Read the manifest and check it (``manifest.py``).
2. Intersect the boxes that are wanted with the boxes that are stored; nothing is known or asked of the old layout.
3. File by file, in the order of their bytes, read the chunks in which wanted bytes lie, check their sums, copy.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint.boxes import Box, intersect
from kenotron.checkpoint.errors import (
    ChecksumError,
    DtypeMismatchError,
    FileSizeError,
    MismatchError,
    RankStateMissingError,
    ShapeMismatchError,
    TensorMissingError,
)
from kenotron.checkpoint.format import CHUNK_BYTES, RESERVED_PREFIXES, LocalTensor, box_of, bytes_of
from kenotron.checkpoint.manifest import Manifest, StoredPiece, check_file_size, read_manifest
from kenotron.checkpoint.values import decode

Source = str | os.PathLike[str] | Manifest

#: What is neither contiguous nor on the CPU is read in parts of about so many bytes and copied from there.
_STAGING_BYTES = 64 << 20


def load_into(source: Source, tensors: Sequence[LocalTensor], *, strict: bool = True, cast: bool = False) -> list[str]:
    """Fill local tensors in place from a checkpoint that was saved on any layout.

    Args:
        source: the checkpoint's path, or its manifest.
        tensors: what to fill, on any device; ``owners`` is ignored.
        strict: raise when a tensor is not in the checkpoint, instead of leaving it as it is.
        cast: convert to another dtype where that of the checkpoint differs.

    Returns:
        The names that are not in the checkpoint (none when ``strict``).

    Raises:
        MismatchError: tensors are missing or have another shape or dtype; the text lists all of them. When all are of
            one kind it is a TensorMissingError, ShapeMismatchError or DtypeMismatchError. Nothing was filled.
        CheckpointError: the checkpoint is damaged (see ``read_manifest``; ChecksumError). What was filled is undefined.
    """
    manifest = _manifest_of(source)
    _raise_mismatches(manifest, _mismatches(manifest, tensors, strict=strict, cast=cast))
    missing = [tensor.name for tensor in tensors if tensor.name not in manifest.tensors]
    _run(manifest, [part for tensor in tensors if tensor.name in manifest.tensors for part in _plan(manifest, tensor)])
    return missing


def load_state(source: Source, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the shared state, its tensors on the CPU.

    Raises:
        PickleRefusedError: something in it is a pickle and ``allow_pickle`` is False.
        CheckpointError: the checkpoint is damaged.
    """
    manifest = _manifest_of(source)
    state: dict[str, Any] = _decode(manifest, manifest.state, "state/", allow_pickle)
    return state


def load_rank_state(source: Source, rank: int, *, allow_pickle: bool = False) -> dict[str, Any] | None:
    """Return the state of one rank as that rank saved it, None where it saved none.

    Raises:
        RankStateMissingError: fewer ranks took part in the save; a layout that has grown must make its own.
        PickleRefusedError, CheckpointError: as ``load_state``.
    """
    manifest = _manifest_of(source)
    if not 0 <= rank < manifest.world_size:
        raise RankStateMissingError(f"{manifest.path} was saved by {manifest.world_size} ranks and has no state of rank {rank}")
    state: dict[str, Any] | None = _decode(manifest, manifest.rank_states[rank], f"rank_state/{rank}/", allow_pickle)
    return state


def load_state_dict(source: Source, prefix: str = "model/") -> dict[str, torch.Tensor]:
    """Return whole tensors on the CPU, in one process.

    Args:
        source: the checkpoint's path, or its manifest.
        prefix: which tensors; it is taken off their names. ``""`` for all, with their full names.

    Returns:
        Name -> tensor. Tied weights are there under each of their names, as one tensor.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest = _manifest_of(source)
    names = [name for name in manifest.tensors if name.startswith(prefix) and not name.startswith(RESERVED_PREFIXES)]
    found = _load_whole(manifest, names)
    found.update({name: found[stored] for name, stored in manifest.aliases.items() if stored in found})
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def _manifest_of(source: Source) -> Manifest:
    return source if isinstance(source, Manifest) else read_manifest(source)


def _decode(manifest: Manifest, node: Any, tensor_prefix: str, allow_pickle: bool) -> Any:
    tensors = _load_whole(manifest, [name for name in manifest.tensors if name.startswith(tensor_prefix)])

    def read_pickle(file: str) -> bytes:
        if file not in manifest.files:
            raise KeyError(f"the file {file!r} is not listed")
        check_file_size(manifest.path / file, manifest.files[file])
        return (manifest.path / file).read_bytes()

    return decode(node, tensors.__getitem__, read_pickle, allow_pickle=allow_pickle)


def _load_whole(manifest: Manifest, names: Iterable[str]) -> dict[str, torch.Tensor]:
    # The manifest's shapes can be allocated: they were checked against the bytes that are there.
    stored = {name: manifest.tensors[name] for name in names}
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
    load_into(manifest, [LocalTensor.whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


def _mismatches(
    manifest: Manifest, tensors: Sequence[LocalTensor], *, strict: bool, cast: bool
) -> Iterator[tuple[type[MismatchError], str]]:
    for tensor in tensors:
        stored = manifest.tensors.get(tensor.name)
        if stored is None:
            if strict:
                yield TensorMissingError, f"{tensor.name}: not in the checkpoint"
            continue
        if stored.shape != tensor.global_shape:
            yield (
                ShapeMismatchError,
                f"{tensor.name}: stored with the shape {list(stored.shape)}, wanted {list(tensor.global_shape)}",
            )
        if stored.dtype != tensor.tensor.dtype and not cast:
            yield (
                DtypeMismatchError,
                f"{tensor.name}: stored as {stored.dtype}, wanted {tensor.tensor.dtype} (cast=True converts)",
            )


def _raise_mismatches(manifest: Manifest, found: Iterable[tuple[type[MismatchError], str]]) -> None:
    mismatches = list(found)
    if not mismatches:
        return
    kinds = {kind for kind, _ in mismatches}
    problems = tuple(problem for _, problem in mismatches)
    kind = kinds.pop() if len(kinds) == 1 else MismatchError
    raise kind("\n".join([f"{manifest.path} does not hold what is to be loaded:", *problems]), problems)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A box of one stored piece that is wanted, and where its elements go.

    Args:
        name: the global tensor's name. dtype: as it is stored.
        piece: what is stored.
        box: what is wanted of it, with offsets in the piece.
        target: a view of the local tensor, of the box's shape.
    """

    name: str
    dtype: torch.dtype
    piece: StoredPiece
    box: Box
    target: torch.Tensor


def _plan(manifest: Manifest, tensor: LocalTensor) -> Iterator[_Part]:
    stored = manifest.tensors[tensor.name]
    for wanted in tensor.pieces:
        for piece in stored.pieces:
            common = intersect(Box(wanted.offset, wanted.shape), piece.box)
            if common is None:
                continue
            here = tuple(
                local + at - offset for local, at, offset in zip(wanted.local, common.offset, wanted.offset, strict=True)
            )
            there = tuple(at - offset for at, offset in zip(common.offset, piece.offset, strict=True))
            yield _Part(
                name=tensor.name,
                dtype=stored.dtype,
                piece=piece,
                box=Box(there, common.shape),
                target=box_of(tensor.tensor, Box(here, common.shape)),
            )


def _run(manifest: Manifest, parts: list[_Part]) -> None:
    """Fill the targets, going through each file once from its beginning to its end."""
    parts.sort(key=lambda part: (part.piece.file, part.piece.begin))
    for file, group in itertools.groupby(parts, key=lambda part: part.piece.file):
        check_file_size(manifest.path / file, manifest.files[file])
        reader = _Reader(manifest.path / file)
        try:
            for part in group:
                reader.fill(part)
        finally:
            reader.close()


class _Reader:
    """Reads boxes out of one shard."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def fill(self, part: _Part) -> None:
        """Copy a box of a piece to its target."""
        piece, target = part.piece, part.target
        if part.box.shape == piece.shape and target.dtype == part.dtype and _is_plain_memory(target):
            self._read(part, piece.begin, bytes_of(target))  # into place: nothing to copy
            return
        strides = _strides(piece.shape)
        for box in _split(part.box, strides, part.dtype.itemsize):
            within = tuple(at - start for at, start in zip(box.offset, part.box.offset, strict=True))
            box_of(target, Box(within, box.shape)).copy_(self._read_box(part, box, strides))

    def _read_box(self, part: _Part, box: Box, strides: tuple[int, ...]) -> torch.Tensor:
        """Return a box of the piece as a view of the staging buffer, valid until the next call."""
        size = part.dtype.itemsize
        first = sum(at * stride for at, stride in zip(box.offset, strides, strict=True))
        last = first + sum((extent - 1) * stride for extent, stride in zip(box.shape, strides, strict=True))
        # Whole chunks: only they have a checksum.
        begin = first * size // CHUNK_BYTES * CHUNK_BYTES
        end = min(-(-(last + 1) * size // CHUNK_BYTES) * CHUNK_BYTES, part.piece.end - part.piece.begin)
        if self._staging.numel() < end - begin:
            self._staging = torch.empty(end - begin, dtype=torch.uint8)
        data = self._staging[: end - begin]
        self._read(part, part.piece.begin + begin, bytes_of(data))
        return data.view(part.dtype).as_strided(box.shape, strides, first - begin // size)

    def _read(self, part: _Part, position: int, into: memoryview) -> None:
        """Fill ``into`` from a position in the file at which a chunk of the piece begins, checking every chunk."""
        first = (position - part.piece.begin) // CHUNK_BYTES
        for index, start in enumerate(range(0, len(into), CHUNK_BYTES)):
            chunk = into[start : start + CHUNK_BYTES]
            self._read_bytes(position + start, chunk)
            if crc32c(chunk) != part.piece.crc32c[first + index]:
                raise ChecksumError(
                    f"{self._path} is damaged: of the tensor {part.name} the bytes from {position + start} to "
                    f"{position + start + len(chunk)} do not have their checksum; load another checkpoint"
                )

    def _read_bytes(self, position: int, into: memoryview) -> None:
        while into:
            num_read = os.preadv(self._descriptor, [into], position)
            if num_read == 0:
                raise FileSizeError(f"{self._path} ends at byte {position}; it has been cut since it was opened")
            into, position = into[num_read:], position + num_read


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """Tell whether ``bytes_of`` returns the memory of the tensor itself."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the row-major strides of ``shape``, in elements."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return tuple(reversed(strides))[: len(shape)]


def _split(box: Box, strides: tuple[int, ...], itemsize: int, dim: int = 0) -> Iterator[Box]:
    """Cut a box into boxes that each span few enough bytes to be staged.

    Rows that lie a chunk or more apart are read one by one, so that the chunks between them are not read at all.
    """
    if dim == len(box.shape):
        yield box
        return
    row_bytes = strides[dim] * itemsize
    last = sum((extent - 1) * stride for extent, stride in zip(box.shape[dim + 1 :], strides[dim + 1 :], strict=True))
    if row_bytes - (last + 1) * itemsize >= CHUNK_BYTES:
        num_rows = 1
    else:
        num_rows = min(box.shape[dim], max(1, _STAGING_BYTES // row_bytes))
    for start in range(0, box.shape[dim], num_rows):
        extent = min(num_rows, box.shape[dim] - start)
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        part = Box(offset, (*box.shape[:dim], extent, *box.shape[dim + 1 :]))
        if extent == 1:
            yield from _split(part, strides, itemsize, dim + 1)
        else:
            yield part
