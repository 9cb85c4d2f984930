"""The header of a safetensors file (https://huggingface.co/docs/safetensors), and what can be wrong with it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kenotron.checkpoint.format import DTYPES, MAX_HEADER_BYTES
from kenotron.files import open_regular
from kenotron.hf.errors import HFDirectoryError, ShardMalformedError, ShardMissingError, ShardTruncatedError

#: How a file begins that Git LFS has left to be downloaded. Read as the length of a header it is out of all bounds.
_LFS_POINTER = b"version "
_MAX_EXTENT = 2**63 - 1
#: More than any tensor has, and so few that their product is no work.
_MAX_DIMS = 1000


class Entry(NamedTuple):
    """A tensor in a file: from the byte ``begin`` to before ``end``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file says of itself. ``tensors``: in the order of their bytes; all sizes in bytes."""

    tensors: dict[str, Entry]
    num_bytes: int  # of the header, where the data begins
    file_bytes: int


def read_header(path: Path) -> Header:
    """Return what a file says of its tensors, if that is not in contradiction to itself."""
    if not path.is_file():
        raise ShardMissingError(f"{path} is missing, or a link to nothing; fetch it again")
    with open_regular(path) as stream:
        file_bytes, start = os.fstat(stream.fileno()).st_size, stream.read(8)
        if start == _LFS_POINTER:
            raise ShardMalformedError(f"{path} is only Git LFS's note of where the file is; run `git lfs pull`")
        num_bytes = 8 + int.from_bytes(start, "little")
        if num_bytes > 8 + MAX_HEADER_BYTES:
            raise ShardMalformedError(f"{path} is no safetensors file: its header would take {num_bytes - 8} bytes")
        if file_bytes < num_bytes:
            raise ShardTruncatedError(
                f"{path} is cut off: it has {file_bytes} bytes and its header alone takes {num_bytes}; fetch it again"
            )
        text = stream.read(num_bytes - 8)
    try:
        nodes = parse_json_object(text)
    except ValueError as error:
        raise ShardMalformedError(f"{path} has a malformed header: {error}") from error
    nodes.pop("__metadata__", None)
    tensors, flaws = {}, []
    for name, node in nodes.items():
        try:
            tensors[name] = _stored(node, num_bytes)
        except ValueError as error:
            flaws.append(f"{name} {error}")
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1][2:]))
    end = num_bytes
    for name, at in tensors.items():
        if at.begin != end and not flaws:
            flaws.append(f"{name} begins at byte {at.begin} of the file, and what precedes it ends at {end}")
        end = at.end
    if flaws:
        raise ShardMalformedError(f"{path} has a malformed header: {'; '.join(flaws)}")
    return Header(tensors, num_bytes, file_bytes)


def _stored(node: Any, data_begin: int) -> Entry:
    """Read what a header says of one tensor; ValueError where that is none of the format."""
    if not isinstance(node, dict) or not node.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError("does not have dtype, shape and data_offsets")
    if not isinstance(node["dtype"], str) or node["dtype"] not in DTYPES:
        raise ValueError(f"has the dtype {node['dtype']!r:.50}, which is none of {', '.join(DTYPES)}")
    shape, offsets = node["shape"], node["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets):
        raise ValueError("has a shape or data_offsets that are no lists of sizes")
    dtype, num_bytes = DTYPES[node["dtype"]], math.prod(shape) * DTYPES[node["dtype"]].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"has data_offsets {offsets} and takes {num_bytes} bytes")
    return Entry(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _are_sizes(node: Any) -> bool:
    return isinstance(node, list) and len(node) <= _MAX_DIMS and all(type(n) is int and 0 <= n <= _MAX_EXTENT for n in node)


def problems_with_size(path: Path, header: Header) -> Iterator[HFDirectoryError]:
    """Yield where a file is not as long as its header says."""
    wanted = max((at.end for at in header.tensors.values()), default=header.num_bytes)
    if header.file_bytes < wanted:
        first = next(name for name, at in header.tensors.items() if at.end > header.file_bytes)
        yield ShardTruncatedError(
            f"{path} is cut off: it has {header.file_bytes} bytes and by its header needs {wanted}; "
            f"the first tensor that is not whole is {first}. Fetch it again"
        )
    elif header.file_bytes > wanted:
        yield ShardMalformedError(f"{path} has {header.file_bytes} bytes, of which its header describes {wanted}")


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; ValueError where it is none, or says two things of one name."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is there twice")
        return found

    try:
        node = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(node, dict):
        raise ValueError("it is no JSON object")
    return node
