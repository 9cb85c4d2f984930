"""The format's constants, what a rank hands over, and the layout of a shard file (docs/checkpoint-format.md)."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kenotron.checkpoint.boxes import Box, find_flaw, is_inside

FORMAT = "kenotron-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
#: One checksum is kept for so many bytes: a flipped bit is found by reading no more than this.
CHUNK_BYTES = 4 << 20
#: Where a shard's data begins, and what `O_DIRECT` asks of a device with large blocks.
ALIGNMENT = 4096
#: The plain safetensors library refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
#: The names of tensors that were found inside the non-tensor state begin so; no `LocalTensor` may.
RESERVED_PREFIXES = ("state/", "rank_state/")
SAVE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNPUBLISHED = re.compile(rf"\.(.+)\.{SAVE_ID.pattern}\.(partial|replaced|removed)", re.DOTALL)

#: The dtypes that a shard can hold, by their safetensors names. `float4_e2m1fn_x2` is left out: safetensors counts its
#: halves of bytes as elements and torch does not, so that the two disagree about shapes.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def unpublished(path: Path, save_id: str, kind: str = "partial") -> Path:
    """Return the sibling of ``path`` that a save works in (``partial``), or that a checkpoint is moved to before it is
    deleted because another one took its place (``replaced``) or it is no longer wanted (``removed``).
    """
    return path.with_name(f".{path.name}.{save_id}.{kind}")


def unpublished_name(name: str) -> str | None:
    """Return the name of the checkpoint that a directory called ``name`` is an unpublished sibling of, if it is one."""
    match = _UNPUBLISHED.fullmatch(name)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An axis-aligned box of a global tensor, and where in a local tensor it lies.

    Args:
        local: offsets in the local tensor.
        offset: offsets in the global tensor.
        shape: extents, the same in both.
        owners: the ranks that hold exactly this piece, where these differ within a tensor; ``None``: those of the tensor.
    """

    local: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """What one rank holds of a global tensor.

    Args:
        name: the global name, such as ``model/layers.0.weight`` or ``optimizer.0/layers.0.weight/exp_avg``.
        tensor: a plain local tensor (a DTensor's ``to_local()``) of any dtype that safetensors knows, on any device;
            it may be non-contiguous, of dimension 0 or without elements.
        global_shape: the shape of the global tensor.
        pieces: what of the global tensor lies here; together they cover the local tensor exactly.
        owners: the ranks that hold exactly these pieces. One of them writes them; all are expected to load them.
        lazy: it changes in optimizer steps alone, so that an asynchronous save may copy it at any time before the next one.

    Raises:
        ValueError: a tensor without plain strided storage, or pieces that do not fit.
    """

    name: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    owners: tuple[int, ...]
    lazy: bool = False

    def __post_init__(self) -> None:
        check_is_plain(self.tensor, self.name)
        local_shape = tuple(self.tensor.shape)
        if len(self.pieces) == 1 and self.pieces[0] == _only_piece(local_shape) and local_shape == self.global_shape:
            return
        for piece in self.pieces:
            if not is_inside(Box(piece.offset, piece.shape), self.global_shape):
                raise ValueError(f"{self.name}: {piece} does not lie inside the global shape {self.global_shape}")
            if not is_inside(Box(piece.local, piece.shape), local_shape):
                raise ValueError(f"{self.name}: {piece} does not lie inside the local shape {local_shape}")
        flaw = find_flaw([Box(piece.local, piece.shape) for piece in self.pieces], local_shape)
        if flaw is not None:
            raise ValueError(
                f"{self.name}: the pieces must cover the local tensor of shape {local_shape} exactly once, "
                f"but its element {flaw[0]} is in {flaw[1]} of them"
            )

    @staticmethod
    def whole(name: str, tensor: torch.Tensor, owners: tuple[int, ...] = (0,), *, lazy: bool = False) -> LocalTensor:
        """Return ``tensor`` as the whole of the global tensor ``name``."""
        shape = tuple(tensor.shape)
        return LocalTensor(name=name, tensor=tensor, global_shape=shape, pieces=(_only_piece(shape),), owners=owners, lazy=lazy)


@functools.lru_cache(maxsize=1024)
def _only_piece(shape: tuple[int, ...]) -> Piece:
    """Return the piece that is the whole of a tensor: a model has few shapes and many tensors."""
    zeros = (0,) * len(shape)
    return Piece(local=zeros, offset=zeros, shape=shape)


def check_is_plain(tensor: torch.Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the tensor's elements can be read and written in place, locally."""
    # A Parameter detaches to a Tensor; a DTensor or another wrapper stays what it is.
    if type(tensor.detach()) is not torch.Tensor:
        raise ValueError(f"{name}: a {type(tensor).__name__} is not a plain tensor; pass its local tensor")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{name}: only dense tensors can be stored, not {tensor.layout} or quantized ones")
    if tensor.is_meta:
        raise ValueError(f"{name}: the tensor is on the meta device and has no data; materialise it first")


def dtype_name(dtype: torch.dtype, name: str) -> str:
    """Return the safetensors name of a dtype; ``ValueError``, which tells the tensor's ``name``, where it has none."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(
            f"{name}: safetensors has no dtype for {dtype}; store the tensor as one of "
            f"{', '.join(str(known).removeprefix('torch.') for known in DTYPE_NAMES)}"
        )
    return DTYPE_NAMES[dtype]


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the view of ``tensor`` that ``box`` cuts out."""
    view = tensor.detach()
    for dim, (start, extent) in enumerate(zip(box.offset, box.shape, strict=True)):
        if extent != view.shape[dim]:
            view = view.narrow(dim, start, extent)
    return view


def entry_key(name: str, global_shape: tuple[int, ...], box: Box) -> str:
    """Return the name that a box of the tensor ``name`` has in a safetensors header."""
    return name if box.shape == global_shape and not any(box.offset) else f"{name}@{','.join(map(str, box.offset))}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the elements in row-major order as bytes: the tensor's own memory if contiguous and on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: one element, or none, counts as contiguous with any strides, and keeps them.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


class ShardEntry(NamedTuple):
    """One box of one global tensor, to be written into a shard.

    Args:
        name: the global tensor's name.
        global_shape: its shape.
        offset: where the box begins in it.
        data: the box's elements, on any device, with any strides.
        lazy: as ``LocalTensor``.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor
    lazy: bool = False

    @property
    def key(self) -> str:
        """The name in the safetensors header."""
        return entry_key(self.name, self.global_shape, Box(self.offset, tuple(self.data.shape)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardPlan:
    """What of a shard's layout stays the same from save to save; then it is the same object.

    Attributes:
        order: of the entries in the file, by their place among those given.
        boxes: name, offset and shape of each, in the order of the file.
        spans: first byte of each and the one after its last, from where the data begins.
        description: the header's entries, after a comma.
        num_bytes: of all.
    """

    order: tuple[int, ...]
    boxes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    spans: tuple[tuple[int, int], ...]
    description: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """A shard file before its data is read: header, plan, and the entries in the order of the file."""

    header: bytes
    plan: ShardPlan
    entries: tuple[ShardEntry, ...]

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        return len(self.header) + self.plan.num_bytes

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where each entry begins in the file, and the byte after its end."""
        start = len(self.header)
        return [(begin + start, end + start) for begin, end in self.plan.spans]

    def buffers(self) -> Iterator[memoryview]:
        """Yield each entry's bytes, in the order of the file; one entry at a time is copied off its device."""
        for entry in self.entries:
            yield bytes_of(entry.data)


def lay_out(entries: Iterable[ShardEntry], metadata: dict[str, str]) -> ShardLayout:
    """Order the entries of a shard and build its header.

    Sizes divisible by 4096 come first, then those divisible by 64, then the rest by falling item size: there are no
    holes (safetensors forbids them), yet large tensors are aligned for the device and all are for their dtype.

    Args:
        entries: boxes with at least one element each.
        metadata: the header's ``__metadata__``.

    Raises:
        ValueError: two entries with one key, a dtype that safetensors does not know, or too long a header.
    """
    given = list(entries)
    plan = _plan(tuple([(e.name, e.global_shape, e.offset, e.data.dtype, e.data.shape) for e in given]))
    text = f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))}{plan.description}}}'.encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the shard's header takes {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}")
    header = len(text).to_bytes(8, "little") + text
    return ShardLayout(header=header, plan=plan, entries=tuple([given[index] for index in plan.order]))


#: name, global shape, offset, dtype and shape of an entry
_Described = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype, tuple[int, ...]]


@functools.lru_cache(maxsize=8)  # a model does not change, and saves are made again and again
def _plan(entries: tuple[_Described, ...]) -> ShardPlan:
    sizes = [math.prod(shape) * dtype.itemsize for _, _, _, dtype, shape in entries]
    order = sorted(range(len(entries)), key=lambda index: _alignment_class(sizes[index], entries[index][3].itemsize))
    described: dict[str, object] = {}
    boxes, spans, position = [], [], 0
    for index in order:
        name, global_shape, offset, dtype, shape = entries[index]
        key, end = entry_key(name, global_shape, Box(offset, shape)), position + sizes[index]
        if key in described or key == "__metadata__":
            raise ValueError(f"two tensors would be stored as {key!r}; rename one of them")
        described[key] = {"dtype": dtype_name(dtype, name), "shape": list(shape), "data_offsets": [position, end]}
        boxes.append((name, offset, tuple(shape)))
        spans.append((position, end))
        position = end
    text = json.dumps(described, separators=(",", ":"))[1:-1]
    return ShardPlan(
        order=tuple(order), boxes=tuple(boxes), spans=tuple(spans), description=text and f",{text}", num_bytes=position
    )


def _alignment_class(num_bytes: int, item_bytes: int) -> tuple[int, int]:
    group = 0 if num_bytes % ALIGNMENT == 0 else 1 if num_bytes % 64 == 0 else 2
    return group, -item_bytes if group == 2 else 0
