"""Load a checkpoint: any layout to any layout, reading only the byte ranges that are wanted, and checking each of them.

1. Read the manifest and check it (``manifest.py``).
2. Intersect the boxes that are wanted with the boxes that are stored; nothing is known or asked of the old layout.
3. Hand those boxes, with the memory that they go to, to the native reader, which reads the chunks in which wanted bytes
   lie, checks their sums and copies. What it cannot write to itself is copied from a staging buffer that it fills.

Chunks of which other ranks want bytes as well go through the page cache, and each process begins with another part of the
files: the ranks of a node together read them from the disk once.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from kenotron.callbacks_native import PieceToRead, ReadError, read_pieces
from kenotron.checkpoint.boxes import Box, find_flaw, intersect, whole
from kenotron.checkpoint.errors import (
    ChecksumError,
    DtypeMismatchError,
    FileSizeError,
    ManifestDamagedError,
    MismatchError,
    OnOtherNodeError,
    RankStateMissingError,
    ShapeMismatchError,
    TensorMissingError,
)
from kenotron.checkpoint.format import CHUNK_BYTES, RESERVED_PREFIXES, LocalTensor, box_of
from kenotron.checkpoint.manifest import Manifest, NodePart, StoredPiece, check_file_size, read_manifest
from kenotron.checkpoint.values import decode, tensors_in
from kenotron.files import read_regular

Source = str | os.PathLike[str] | Manifest

#: What is not on the CPU, or not as it is stored, is read in parts of at most so many bytes and copied from there.
_STAGING_BYTES = 256 << 20
#: Where parts begin in the staging buffer: at a multiple of any item's size.
_STAGING_ALIGNMENT = 64
_MERGE = "Load on the layout that saved it, or bring the parts together: kenotron checkpoint merge OUT PART..."


def load_into(source: Source, tensors: Sequence[LocalTensor], *, strict: bool = True, cast: bool = False) -> list[str]:
    """Fill local tensors in place from a checkpoint that was saved on any layout.

    Args:
        source: the checkpoint's path, or its manifest.
        tensors: what to fill, on any device; ``owners`` only tells what other ranks load, too.
        strict: raise when a tensor is not in the checkpoint, instead of leaving it as it is.
        cast: convert to another dtype where that of the checkpoint differs.

    Returns:
        The names that are not in the checkpoint (none when ``strict``).

    Raises:
        MismatchError: tensors are missing or have another shape or dtype; the text lists all of them. When all are of
            one kind it is a TensorMissingError, ShapeMismatchError or DtypeMismatchError. Nothing was filled.
        OnOtherNodeError: it is one node's part, and what is wanted lies on another node. Nothing was filled.
        CheckpointError: the checkpoint is damaged (see ``read_manifest``; ChecksumError). What was filled is undefined.
        OSError: the device or the file system failed.
    """
    manifest = _manifest_of(source)
    _raise_mismatches(manifest, _mismatches(manifest, tensors, strict=strict, cast=cast))
    missing = [tensor.name for tensor in tensors if tensor.name not in manifest.tensors]
    there = [tensor for tensor in tensors if tensor.name in manifest.tensors]
    _check_here(manifest, ((tensor.name, Box(piece.offset, piece.shape)) for tensor in there for piece in tensor.pieces))
    _fill(manifest, [part for tensor in there for part in _plan(manifest, tensor)])
    return missing


def load_state(source: Source, *, allow_pickle: bool = False, left_out: list[str] | None = None) -> dict[str, Any]:
    """Return the shared state, its tensors on the CPU.

    Args:
        left_out: receives where a pickle is that was left out because ``allow_pickle`` is False; None: refuse it.

    Raises:
        PickleRefusedError: something in it is a pickle, ``allow_pickle`` is False and ``left_out`` None.
        CheckpointError: the checkpoint is damaged.
    """
    manifest = _manifest_of(source)
    state: dict[str, Any] = _decode(manifest, manifest.state, allow_pickle, left_out)
    return state


def load_rank_state(
    source: Source, rank: int, *, allow_pickle: bool = False, left_out: list[str] | None = None
) -> dict[str, Any] | None:
    """Return the state of one rank as that rank saved it, None where it saved none.

    Raises:
        RankStateMissingError: fewer ranks took part in the save; a layout that has grown must make its own.
        OnOtherNodeError: the rank saved it on another node.
        PickleRefusedError, CheckpointError: as ``load_state``.
    """
    manifest = _manifest_of(source)
    if not 0 <= rank < manifest.world_size:
        raise RankStateMissingError(f"{manifest.path} was saved by {manifest.world_size} ranks and has no state of rank {rank}")
    if manifest.node is not None and rank not in manifest.node.ranks:
        raise OnOtherNodeError(f"{manifest.path} is {_whose(manifest.node)}; the state of rank {rank} is elsewhere. {_MERGE}")
    state: dict[str, Any] | None = _decode(manifest, manifest.rank_states[rank], allow_pickle, left_out)
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


def _decode(manifest: Manifest, node: Any, allow_pickle: bool, left_out: list[str] | None) -> Any:
    tensors = _load_whole(manifest, [name for name in tensors_in(node) if name in manifest.tensors])

    def load_tensor(name: str) -> torch.Tensor:
        if name not in tensors:  # which a pickle refers to
            tensors.update(_load_whole(manifest, [name]))
        return tensors[name]

    def read_pickle(file: str) -> bytes:
        if file not in manifest.files:
            raise KeyError(f"the file {file!r} is not listed")
        check_file_size(manifest.path / file, manifest.files[file])
        return read_regular(manifest.path / file)

    return decode(node, load_tensor, read_pickle, allow_pickle=allow_pickle, left_out=left_out)


def _load_whole(manifest: Manifest, names: Iterable[str]) -> dict[str, torch.Tensor]:
    # The manifest's shapes can be allocated: they were checked against the bytes that are there.
    stored = {name: manifest.tensors[name] for name in names}
    _check_here(manifest, ((name, whole(tensor.shape)) for name, tensor in stored.items()))
    # A model under construction may have another default device.
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for name, tensor in stored.items()}
    everybody = tuple(range(dist.get_world_size() if dist.is_initialized() else 1))
    load_into(manifest, [LocalTensor.whole(name, tensor, everybody) for name, tensor in tensors.items()])
    return tensors


def _check_here(manifest: Manifest, wanted: Iterable[tuple[str, Box]]) -> None:
    """Raise ``OnOtherNodeError`` where a node's part does not hold all of what is wanted."""
    if manifest.node is None:  # whole, which was checked when it was read
        return
    elsewhere = []
    for name, box in wanted:
        found = [common for piece in manifest.tensors[name].pieces if (common := intersect(box, piece.box)) is not None]
        held = [Box(tuple(at - start for at, start in zip(b.offset, box.offset, strict=True)), b.shape) for b in found]
        flaw = find_flaw(held, box.shape)
        if flaw is not None and flaw[1] > 1:
            raise ManifestDamagedError(f"{manifest.path} contradicts itself: an element of {name} is stored {flaw[1]} times")
        if flaw is not None:
            elsewhere.append(name)
    if elsewhere:
        shown = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
        raise OnOtherNodeError(f"{manifest.path} is {_whose(manifest.node)} and lacks what is wanted of {shown}. {_MERGE}")


def _whose(node: NodePart) -> str:
    return f"the part of node {node.index} of {node.count} (ranks {', '.join(map(str, node.ranks))})"


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
        shared: other ranks are about to read the same bytes.
    """

    name: str
    dtype: torch.dtype
    piece: StoredPiece
    box: Box
    target: torch.Tensor
    shared: bool


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
            owners = tensor.owners if wanted.owners is None else wanted.owners
            yield _Part(
                name=tensor.name,
                dtype=stored.dtype,
                piece=piece,
                box=Box(there, common.shape),
                target=box_of(tensor.tensor, Box(here, common.shape)),
                shared=len(owners) > 1 or _is_strewn(common.shape, piece.shape),
            )


def _is_strewn(shape: Sequence[int], piece_shape: Sequence[int]) -> bool:
    """Return whether much of what lies between a box's first and last byte is not its own: others will want that."""
    span, stride = 1, 1
    for extent, whole_extent in zip(reversed(shape), reversed(piece_shape), strict=True):
        span += (extent - 1) * stride
        stride *= whole_extent
    return 4 * math.prod(shape) <= 3 * span


def _fill(manifest: Manifest, parts: Iterable[_Part]) -> None:
    in_place: list[_Part] = []
    others: list[_Part] = []
    for part in parts:
        (in_place if _can_be_filled_in_place(part) else others).append(part)
    _read(manifest, in_place)
    others.sort(key=lambda part: (part.piece.file, part.piece.begin))
    small = [cut for part in others for cut in _split(part)]
    staging = torch.empty(min(_STAGING_BYTES, sum(map(_staged_bytes, small))), dtype=torch.uint8, device="cpu")
    for batch in _batches(small):
        staged = _stage(batch, staging)
        _read(manifest, staged)
        for part, copy in zip(batch, staged, strict=True):
            part.target.copy_(copy.target)


def _read(manifest: Manifest, parts: Sequence[_Part]) -> None:
    """Fill targets that are plain memory; raise what is wrong with the files."""
    files = {file: index for index, file in enumerate(dict.fromkeys(part.piece.file for part in parts))}
    for file in files:
        check_file_size(manifest.path / file, manifest.files[file])
    by_piece: defaultdict[tuple[str, int], list[_Part]] = defaultdict(list)  # of two boxes each chunk is still read once
    for part in parts:
        by_piece[part.piece.file, part.piece.begin].append(part)
    wanted = list(by_piece.values())
    pieces = []
    for boxes in wanted:
        stored, item_bytes = boxes[0].piece, boxes[0].dtype.itemsize
        piece = piece_to_read(stored, item_bytes, files[stored.file], shared=any(part.shared for part in boxes))
        for part in boxes:
            strides = [stride * part.dtype.itemsize for stride in part.target.stride()]
            piece.add_target(offset=part.box.offset, shape=part.box.shape, address=part.target.data_ptr(), strides=strides)
        pieces.append(piece)
    result = read_pieces([manifest.path / file for file in files], pieces, chunk_bytes=CHUNK_BYTES)
    for error in result.errors:
        raise exception_of(error, wanted[error.piece][0].name)


def piece_to_read(piece: StoredPiece, item_bytes: int, file: int, *, shared: bool = False) -> PieceToRead:
    """Return a stored piece as the native reader takes it, with nothing wanted of it yet.

    Args:
        piece: what is stored.
        item_bytes: the size of an element.
        file: the index of its file among those that are read.
        shared: other processes read it as well.
    """
    return PieceToRead(
        file=file,
        begin=piece.begin,
        num_bytes=piece.end - piece.begin,
        checksums=piece.crc32c,
        item_bytes=item_bytes,
        shape=piece.shape,
        shared=shared,
    )


def exception_of(error: ReadError, name: str) -> Exception:
    """Return what the native reader found as an exception, for a piece of the tensor ``name``."""
    if error.kind == "io":
        return OSError(error.code, os.strerror(error.code), error.path)
    if error.kind == "cut":
        return FileSizeError(f"{error.path} ends at byte {error.offset}; it has been cut since it was opened")
    return ChecksumError(
        f"{error.path} is damaged: of the tensor {name} the bytes from {error.offset} to {error.offset + error.length} "
        f"do not have their checksum; load another checkpoint"
    )


def _can_be_filled_in_place(part: _Part) -> bool:
    """Tell whether the target's memory takes the stored bytes as they are, each element at a place of its own."""
    target = part.target
    is_plain = target.is_cpu and target.dtype == part.dtype and not target.is_conj() and not target.is_neg()
    return is_plain and all(stride or extent == 1 for stride, extent in zip(target.stride(), target.shape, strict=True))


def _split(part: _Part, dim: int = 0) -> Iterator[_Part]:
    """Cut a part into parts that each fit into the staging buffer."""
    num_bytes = part.box.volume * part.dtype.itemsize
    if num_bytes <= _STAGING_BYTES:
        yield part
        return
    num_rows = max(1, _STAGING_BYTES * part.box.shape[dim] // num_bytes)
    for start in range(0, part.box.shape[dim], num_rows):
        yield from _split(_rows(part, dim, start, min(num_rows, part.box.shape[dim] - start)), dim + 1)


def _rows(part: _Part, dim: int, start: int, extent: int) -> _Part:
    offset, shape = list(part.box.offset), list(part.box.shape)
    offset[dim] += start
    shape[dim] = extent
    return replace(part, box=Box(tuple(offset), tuple(shape)), target=part.target.narrow(dim, start, extent))


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Yield as many parts at a time as fit into the staging buffer."""
    batch: list[_Part] = []
    num_bytes = 0
    for part in parts:
        if batch and num_bytes + _staged_bytes(part) > _STAGING_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(part)
        num_bytes += _staged_bytes(part)
    if batch:
        yield batch


def _stage(parts: Sequence[_Part], staging: torch.Tensor) -> list[_Part]:
    """Return the parts with targets in the staging buffer, contiguous and with the dtype that is stored."""
    staged, begin = [], 0
    for part in parts:
        memory = staging[begin : begin + part.box.volume * part.dtype.itemsize]
        staged.append(replace(part, target=memory.view(part.dtype).view(part.box.shape)))
        begin += _staged_bytes(part)
    return staged


def _staged_bytes(part: _Part) -> int:
    return -(-part.box.volume * part.dtype.itemsize // _STAGING_ALIGNMENT) * _STAGING_ALIGNMENT
