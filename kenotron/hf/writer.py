"""Write a Hugging Face model directory as a stream: box by box, in any order, published by one rename.

1. Begin in a sibling directory, ``.<name>.partial-<id>``.
2. Plan: all tensors decide the files, whose room is claimed and whose headers are written. A full disk is found here.
3. Write boxes of tensors to their places. A file is fsynced and closed when its last byte has come.
4. At the end of the ``with`` block: has every element of every tensor been written once? Then write the index, fsync
   what else stands beside, rename. On any error the sibling directory is removed, and nothing stands at the path.

A process that is killed leaves the sibling directory behind, to be removed by hand.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from kenotron.checkpoint.boxes import Box, find_flaw
from kenotron.checkpoint.format import ShardEntry, ShardLayout, bytes_of, check_is_plain, dtype_name, lay_out
from kenotron.checkpoint.save import remove_tree
from kenotron.durable import fsync, fsync_directory, make_directories, reserve, write_durably
from kenotron.hf.directory import INDEX
from kenotron.hf.errors import ModelIncompleteError, raise_all
from kenotron.hf.ranges import Ranges, box_in, runs_of

#: What transformers asks of every file that it loads.
_METADATA = MappingProxyType({"format": "pt"})


@dataclass
class _Shard:
    """A file that is being written; the descriptor is open until ``num_missing`` bytes of data have come."""

    path: Path
    descriptor: int
    num_missing: int

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                count = os.pwrite(self.descriptor, data, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            data, offset = data[count:], offset + count

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass
class _Planned:
    """A tensor that is to come, where in which file, and what of it has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: _Shard
    begin: int
    boxes: list[Box] = field(default_factory=list)
    num_written: int = 0


class HFWriter:
    """Writes a model directory that safetensors and ``from_pretrained`` open, in slices as small as the caller likes.

    ::

        with HFWriter("out") as writer:
            writer.plan({"w": (torch.bfloat16, (8, 4))})
            writer.write("w", upper, box=((0, 4), (0, 4)))
            writer.write("w", lower, box=((4, 8), (0, 4)))
            config.save_pretrained(writer.path)

    Args:
        out: the directory to make; it may exist if it is empty.
        max_shard_bytes: a file holds tensors of at most so many bytes, or one tensor that is larger.
        metadata: the ``__metadata__`` of each file. transformers insists on ``format``.

    Raises:
        ValueError: something stands at ``out``, or an argument is out of range.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9, metadata: Mapping[str, str] = _METADATA
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive; 5 * 10**9 is what transformers takes")
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError(f"metadata={dict(metadata)} must map text to text; store other values as JSON in a text")
        self.out = Path(os.path.realpath(out))
        _check_is_free(self.out)
        #: Where all is written until the block ends. What else belongs to the model (``config.json``, the tokenizer,
        #: ``generation_config.json``) goes here as well.
        self.path = self.out.with_name(f".{self.out.name}.partial-{uuid.uuid4().hex[:12]}")
        self._max_shard_bytes, self._metadata = max_shard_bytes, dict(metadata)
        self._shards: list[_Shard] = []
        self._planned: dict[str, _Planned] = {}
        self._index: bytes | None = None

    def __enter__(self) -> Self:
        make_directories(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for shard in self._shards:
                with contextlib.suppress(OSError):  # it is about to be removed
                    shard.close()
            if os.path.lexists(self.path):
                remove_tree(self.path)

    def plan(self, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        """Tell all tensors that will come; once, before the first ``write``.

        The files are those that ``save_pretrained`` would make of a state dict in this order: it decides which tensors
        share one. Their index counts as ``total_parameters`` the elements of all tensors.

        Args:
            tensors: name -> dtype and shape.

        Raises:
            ValueError: there are none, or one that safetensors cannot store; or this was called before.
            OSError: there is no room for a file, which is named, or the file system failed.
        """
        if self._planned or not tensors:
            raise ValueError("plan() takes all tensors in one call, and at least one; bring the calls together")
        for name, (dtype, _) in tensors.items():
            dtype_name(dtype, name)
        described = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, (dtype, shape) in tensors.items()}
        split = split_torch_state_dict_into_shards(described, max_shard_size=self._max_shard_bytes)
        for file, names in split.filename_to_tensors.items():
            layout = lay_out([_entry(name, described[name]) for name in names], self._metadata)
            shard = self._create(self.path / file, layout)
            for entry, (begin, _) in zip(layout.entries, layout.ranges, strict=True):
                self._planned[entry.name] = _Planned(entry.data.dtype, entry.global_shape, shard, begin)
        if split.is_sharded:
            num_items = sum(tensor.numel() for tensor in described.values())
            index = {
                "metadata": {"total_parameters": num_items, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            self._index = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def write(self, name: str, tensor: torch.Tensor, box: Ranges = None) -> None:
        """Write a tensor, or a box of it; of all boxes each element is in one.

        Args:
            name: a tensor of the plan.
            tensor: of the planned dtype and the box's shape, on any device, with any strides. What is not contiguous on
                the CPU is copied: memory grows by that much.
            box: (start, stop) for each dimension; None for the whole tensor.

        Raises:
            ValueError: the tensor is not in the plan or not as planned, the box lies outside of it, or more comes than it
                has elements.
            OSError: the file, which is named, could not be written.
        """
        if name not in self._planned:
            raise ValueError(f"{name} is not planned; call plan() once, with it and all others")
        planned = self._planned[name]
        check_is_plain(tensor, name)
        into = box_in(planned.shape, box, name)
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, into.shape):
            raise ValueError(
                f"{name}: here {planned.dtype} of the shape {list(into.shape)} is planned, "
                f"not {tensor.dtype} of {list(tensor.shape)}; convert it before, or plan otherwise"
            )
        if planned.num_written + into.volume > math.prod(planned.shape):
            raise ValueError(
                f"{name}: with box={box} more would be written than its shape {list(planned.shape)} has; once is enough"
            )
        shard, data = planned.shard, bytes_of(tensor)
        offsets, run = runs_of(planned.shape, into, planned.dtype.itemsize)
        for index, offset in enumerate(offsets):
            shard.write(data[index * run : (index + 1) * run], planned.begin + offset)
        planned.boxes.append(into)
        planned.num_written += into.volume
        shard.num_missing -= len(data)
        if shard.num_missing == 0 and shard.descriptor >= 0:
            os.fsync(shard.descriptor)
            shard.close()

    def _create(self, path: Path, layout: ShardLayout) -> _Shard:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        shard = _Shard(path, descriptor, layout.num_bytes - len(layout.header))
        self._shards.append(shard)
        reserve(descriptor, layout.num_bytes, path)
        shard.write(memoryview(layout.header), 0)
        return shard

    def _publish(self) -> None:
        """Check that all has come, bring it to the disk and give the directory its name."""
        if not self._planned:
            raise ModelIncompleteError(f"{self.out} is not written: plan() was not called, so that there are no tensors")
        flaws = [_flaw(name, planned) for name, planned in self._planned.items()]
        raise_all(f"{self.out} is not written:", [ModelIncompleteError(flaw) for flaw in flaws if flaw is not None])
        if self._index is not None:
            write_durably(self.path / INDEX, self._index)
        for folder, _, files in os.walk(self.path):
            for file in files:
                fsync(Path(folder, file))
            fsync_directory(Path(folder))
        _check_is_free(self.out)
        os.rename(self.path, self.out)
        fsync_directory(self.out.parent)


def _check_is_free(out: Path) -> None:
    """Raise ValueError where a rename could not give a directory the name ``out``."""
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which nothing can take the place of; choose a new folder inside it")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; choose another path, or remove it first")


def _entry(name: str, tensor: torch.Tensor) -> ShardEntry:
    shape = tuple(tensor.shape)
    return ShardEntry(name=name, global_shape=shape, offset=(0,) * len(shape), data=tensor)


def _flaw(name: str, planned: _Planned) -> str | None:
    """Return what of a tensor was not written exactly once, if anything."""
    if planned.num_written == 0 and 0 not in planned.shape:
        return f"{name}: nothing of it was written"
    flaw = find_flaw(planned.boxes, planned.shape)
    if flaw is None:
        return None
    index, count = flaw
    return f"{name}: of the shape {list(planned.shape)} the element {list(index)} was written {count} times"
