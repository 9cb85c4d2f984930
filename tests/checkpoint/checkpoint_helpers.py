"""What the checkpoint tests share: ways of cutting tensors into boxes, and of damaging checkpoints."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kenotron.callbacks_native import crc32c
from kenotron.checkpoint import LocalTensor, Piece, load_state, load_state_dict, save
from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.format import box_of

#: ``save`` on several ranks at once (conftest.py); returns what each raised.
SaveOnRanks = Callable[..., list[BaseException | None]]


def whole(name: str, tensor: torch.Tensor) -> LocalTensor:
    return LocalTensor.whole(name, tensor)


def tiles(shape: tuple[int, ...], count: int, generator: random.Random) -> list[Box]:
    """Cut ``shape`` at random into at most ``count`` boxes."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(count - 1):
        box = boxes.pop(generator.randrange(len(boxes)))
        dims = [dim for dim, extent in enumerate(box.shape) if extent > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = generator.choice(dims)
        at = generator.randrange(1, box.shape[dim])
        for start, extent in ((0, at), (at, box.shape[dim] - at)):
            offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
            boxes.append(Box(offset, (*box.shape[:dim], extent, *box.shape[dim + 1 :])))
    return boxes


def holding(name: str, full: torch.Tensor, box: Box, inner: Sequence[Box], owners: tuple[int, ...]) -> LocalTensor:
    """What a rank holds that has ``box`` of ``full``, told in the pieces ``inner`` of that box."""
    pieces = tuple(
        Piece(
            local=piece.offset,
            offset=tuple(a + b for a, b in zip(box.offset, piece.offset, strict=True)),
            shape=piece.shape,
        )
        for piece in inner
    )
    return LocalTensor(
        name=name, tensor=box_of(full, box).clone(), global_shape=tuple(full.shape), pieces=pieces, owners=owners
    )


def rows(name: str, full: torch.Tensor, world_size: int) -> list[LocalTensor]:
    """What each rank holds of a tensor that is cut along its first dimension; the last ones may hold nothing."""
    size = -(-full.shape[0] // world_size)
    held = []
    for rank in range(world_size):
        start = min(rank * size, full.shape[0])
        extent = min(size, full.shape[0] - start)
        box = Box((start,) + (0,) * (full.ndim - 1), (extent, *full.shape[1:]))
        held.append(holding(name, full, box, [Box((0,) * full.ndim, box.shape)], (rank,)))
    return held


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a checkpoint and seal it again, as an attacker would."""
    file = path / "manifest.json"
    node = json.loads(file.read_bytes())
    change(node)
    del node["crc32c"]
    content = json.dumps(node, separators=(",", ":")).encode()[:-1]
    file.write_bytes(content + b',"crc32c":"%08x"}\n' % crc32c(content))


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def leftovers(path: Path) -> list[str]:
    """What stands beside a checkpoint and is named after it."""
    return sorted(other.name for other in path.parent.iterdir() if re.match(rf"\.{re.escape(path.name)}\.", other.name))


def save_value(path: Path, save_id: str, value: float = 0.0, **options: Any) -> None:
    """One rank saves a tensor and a state that both hold ``value``."""
    tensors = [whole("model/w", torch.full((4,), value))]
    save(path, tensors, {"value": value}, rank=0, world_size=1, save_id=save_id, **options)


def assert_holds(path: Path, value: float) -> None:
    assert load_state(path) == {"value": value}
    assert torch.equal(load_state_dict(path)["w"], torch.full((4,), value))
