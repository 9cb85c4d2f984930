"""Read a local Hugging Face model directory: safetensors files, of several the index, and ``config.json``.

1. Find the files that are the model, as transformers does.
2. Parse their headers (``header.py``), and tell everything that is wrong with the directory in one error.
3. Turn a box of a tensor into runs of bytes, and read these straight to where they go. Nothing is mapped into memory:
   the pages of a mapped file count as the process's own.

The formats: https://huggingface.co/docs/safetensors, and the index that ``PreTrainedModel.save_pretrained`` writes.
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch

from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.format import box_of, bytes_of, check_is_plain
from kenotron.files import read_regular
from kenotron.hf.errors import (
    HFDirectoryError,
    NotAModelDirectoryError,
    ShardTruncatedError,
    WeightIndexError,
    raise_all,
)
from kenotron.hf.header import Entry, parse_json_object, problems_with_size, read_header
from kenotron.hf.ranges import STAGING_BYTES, Ranges, box_in, parts_of, read_together, runs_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth")


class HFTensor(NamedTuple):
    """What a directory says of a tensor. ``file``: the name, in the directory, of the file that holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str


class HFDirectory:
    """A local Hugging Face model directory. Making it reads the headers; ``read`` reads data.

    It holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that this names, or one single
    safetensors file of another name. Nothing changes once it was made, so threads may share it.

    Args:
        path: the directory. Nothing is ever downloaded.

    Raises:
        HFDirectoryError: a ValueError which lists all that is wrong with the directory; see its subclasses.
        OSError: the file system failed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files, weight_map = _find_weights(self.path)
        problems: list[HFDirectoryError] = []
        stored: dict[str, dict[str, Entry]] = {}
        for file in files:
            try:
                header = read_header(self.path / file)
            except HFDirectoryError as error:
                problems.append(error)
            else:
                stored[file] = header.tensors
                problems += problems_with_size(self.path / file, header)
        problems += _problems_with_index(weight_map, stored)
        raise_all(f"{self.path} cannot be read as a model:", problems)
        #: Name -> dtype, shape and file, in the order of the files and, in each, of the bytes.
        self.tensors: Mapping[str, HFTensor] = MappingProxyType(
            {name: HFTensor(at.dtype, at.shape, file) for file, tensors in stored.items() for name, at in tensors.items()}
        )
        self._begins = {name: at.begin for tensors in stored.values() for name, at in tensors.items()}

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order in which a disk reads them best."""
        return list(self.tensors)

    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``; NotAModelDirectoryError where there is none that can be read."""
        file = self.path / "config.json"
        if not file.is_file():
            raise NotAModelDirectoryError(f"{self.path} has no config.json; copy it from where the model came from")
        try:
            return parse_json_object(read_regular(file))
        except ValueError as error:
            raise NotAModelDirectoryError(f"{file} is malformed: {error}") from error

    def read(self, name: str, box: Ranges = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read a tensor, or a box of it, and no more of the file than that takes.

        Memory beyond the result stays below 20 MB. The interpreter is free meanwhile: threads read in parallel.

        Args:
            name: the tensor's name.
            box: (start, stop) for each dimension; None for all of it.
            out: a plain CPU tensor of the box's shape to fill, with any strides. Into another dtype is converted as
                ``Tensor.copy_`` does.

        Returns:
            ``out``, or a new CPU tensor of the box's shape and of the dtype that is stored, bit for bit.

        Raises:
            ValueError: there is no such tensor, the box does not lie inside it, or ``out`` does not fit.
            ShardTruncatedError: the file has been cut since the directory was opened.
            OSError: the file system failed.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors) or self.names()[:3]
            raise ValueError(f"{self.path} has no tensor {name!r}; it has {', '.join(near)} and others, see names()")
        dtype, shape, file = self.tensors[name]
        wanted = box_in(shape, box, name)
        result = torch.empty(wanted.shape, dtype=dtype, device="cpu") if out is None else out
        check_is_plain(result, name)
        if not result.is_cpu or result.shape != wanted.shape:
            given = f"{list(result.shape)} on {result.device}"
            raise ValueError(f"{name}: out must be of the shape {list(wanted.shape)} and on the CPU, not {given}")
        with _Source(self.path / file, self._begins[name], shape, dtype.itemsize) as source:
            if result.dtype == dtype and _lies_in_order(result):
                source.read(wanted, bytes_of(result))
            else:
                _read_and_copy(source, wanted, dtype, result)
        return result


# ---- 1. Which files -------------------------------------------------------------------------------------------------


def _find_weights(path: Path) -> tuple[list[str], Mapping[str, str]]:
    """Return the names of the files that are the model, and the index's tensor -> file, empty where it needs none."""
    if not path.is_dir():
        raise NotAModelDirectoryError(
            f"{path} is not a directory. Models are not downloaded: fetch it first, as with "
            f"`hf download {path} --local-dir FOLDER`, and pass that folder"
        )
    names = sorted(entry.name for entry in path.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        weight_map = _read_index(path / INDEX)
        files = sorted(set(weight_map.values()))
        if WEIGHTS in found and WEIGHTS not in files:
            raise NotAModelDirectoryError(
                f"{path} holds {WEIGHTS} and, by its index, {', '.join(files[:2])}: which is the model? Remove the other"
            )
        return files, weight_map
    if WEIGHTS in found or len(found) == 1:
        return [WEIGHTS if WEIGHTS in found else found[0]], {}
    if found:
        raise NotAModelDirectoryError(
            f"{path} holds several safetensors files ({', '.join(found[:3])} ...) and no {INDEX} that tells which are "
            f"the model; fetch the index, or leave one file"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise NotAModelDirectoryError(
            f"{path} holds pickles alone ({', '.join(pickles[:3])}), which can run code and are not read. Convert them: "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained('FOLDER') of transformers writes safetensors"
        )
    raise NotAModelDirectoryError(f"{path} holds no safetensors files; pass the folder that has {WEIGHTS} or {INDEX}")


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = parse_json_object(read_regular(file)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise ValueError("it has no weight_map of tensors to files")
        if not weight_map:
            raise ValueError("its weight_map is empty")
        if outside := sorted({value for value in weight_map.values() if value in ("", ".", "..") or "/" in value}):
            raise ValueError(f"it names what is not directly in the directory: {', '.join(map(repr, outside))}")
    except ValueError as error:
        raise WeightIndexError(f"{file} is malformed: {error}") from error
    return weight_map


def _problems_with_index(weight_map: Mapping[str, str], stored: Mapping[str, Mapping[str, Any]]) -> Iterator[HFDirectoryError]:
    """Yield where the index and those files that could be read contradict each other, or two of these do."""
    lacking, holders = defaultdict(list), defaultdict(list)
    for name, file in weight_map.items():
        if file in stored and name not in stored[file]:
            lacking[file].append(name)
    for file, tensors in stored.items():
        for name in tensors:
            holders[name].append(file)
    for file, lacked in sorted(lacking.items()):
        elsewhere = [f"{name} (which {' and '.join(holders[name])} has)" if name in holders else name for name in lacked]
        yield WeightIndexError(f"{INDEX} says that {file} holds {', '.join(elsewhere)}; it does not")
    for name, files in holders.items():
        if len(files) > 1:
            yield WeightIndexError(f"{name} is in {' and in '.join(files)}; which one counts cannot be told")


# ---- 2. Data --------------------------------------------------------------------------------------------------------


class _Source:
    """A row-major array in a file that is open inside the ``with`` block."""

    def __init__(self, path: Path, begin: int, shape: tuple[int, ...], item_bytes: int) -> None:
        self._path, self._begin, self._shape, self._item_bytes = path, begin, shape, item_bytes
        self._staging = bytes_of(torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu"))  # costs nothing until it is used
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def read(self, box: Box, into: memoryview) -> None:
        """Fill ``into`` with the elements of a box, in row-major order."""
        offsets, run = runs_of(self._shape, box, self._item_bytes)
        for group in read_together(offsets, run):
            if len(group) == 1:
                self._read_at(group[0], into[:run])
            else:
                self._read_at(group[0], self._staging[: group[-1] + run - group[0]])
                for index, offset in enumerate(group):
                    into[index * run : (index + 1) * run] = self._staging[offset - group[0] :][:run]
            into = into[len(group) * run :]

    def _read_at(self, offset: int, into: memoryview) -> None:
        offset += self._begin
        while into:
            try:
                count = os.preadv(self._descriptor, [into], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            if count == 0:
                now = os.fstat(self._descriptor).st_size
                raise ShardTruncatedError(f"{self._path} has only {now} bytes left; it has been cut since it was opened")
            into, offset = into[count:], offset + count


def _lies_in_order(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor's memory is its elements in row-major order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _read_and_copy(source: _Source, box: Box, dtype: torch.dtype, out: torch.Tensor) -> None:
    """Fill a tensor whose memory does not take the bytes as they are, through a small one."""
    max_items = STAGING_BYTES // dtype.itemsize
    staging = torch.empty(min(max_items, box.volume), dtype=dtype, device="cpu")
    for part in parts_of(box.shape, max_items):
        staged = staging[: part.volume]
        offset = tuple(start + more for start, more in zip(box.offset, part.offset, strict=True))
        source.read(Box(offset, part.shape), bytes_of(staged))
        box_of(out, part).copy_(staged.view(part.shape))
