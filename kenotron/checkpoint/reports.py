"""What ranks report of their shards, and the manifest's tensors that all reports make up.

A report tells in one text what is the same in each save of a training (names, dtypes, shapes, places), and apart from it the
checksums. Who merges the reports does so while training goes on, in an interpreter that both share: what has not changed
since the last save is neither read, nor checked, nor written out again.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from kenotron.checkpoint.boxes import find_flaw
from kenotron.checkpoint.errors import CoverageError
from kenotron.checkpoint.format import CHUNK_BYTES, DTYPE_NAMES, ShardPlan
from kenotron.checkpoint.manifest import StoredPiece, StoredTensor, to_text

#: name, dtype and global shape of a tensor that a rank passes
Described = tuple[str, torch.dtype, tuple[int, ...]]
#: Where the checksums of a piece go in the JSON of tensors that have none. Inside of a name the quotes would be escaped.
_NO_CHECKSUMS = '"crc32c":[]'


@functools.lru_cache(maxsize=2)  # with and without the optimizer's state
def describe_shard(shard: str, described: tuple[Described, ...], plan: ShardPlan, start: int) -> str:
    """Return as text what a rank passes and where it lies in its shard; no checksums.

    Args:
        shard: the file's name. described: all that the rank passes, also what others write. start: where the data begins.
    """
    pieces: defaultdict[str, list[StoredPiece]] = defaultdict(list)
    for (name, offset, shape), (begin, end) in zip(plan.boxes, plan.spans, strict=True):
        piece = StoredPiece(file=shard, begin=begin + start, end=end + start, offset=offset, shape=shape, crc32c=())
        pieces[name].append(piece)
    tensors = {name: StoredTensor(dtype=dtype, shape=shape, pieces=tuple(pieces[name])) for name, dtype, shape in described}
    return to_text({name: tensor.to_json() for name, tensor in tensors.items()})


class MergedTensors(NamedTuple):
    """Global tensors that the ranks' pieces make up.

    Attributes:
        tensors: by name; without checksums.
        texts: their JSON, cut where checksums go.
        places: where those of each piece are found, in the order of ``texts``: whose, the first, and the one after the last.
    """

    tensors: Mapping[str, StoredTensor]
    texts: Sequence[str]
    places: Sequence[tuple[int, int, int]]

    def to_json(self, checksums: Sequence[Sequence[int]]) -> str:
        """Return the manifest's tensors.

        Args:
            checksums: of each rank, of all chunks of its shard in the order of the file.
        """
        found = (f'"crc32c":[{",".join(map(str, checksums[rank][first:end]))}]' for rank, first, end in self.places)
        return "".join(itertools.chain(*zip(self.texts, found, strict=False), self.texts[-1:]))


@functools.lru_cache(maxsize=2)
def merge(reports: tuple[str, ...], is_whole: bool) -> MergedTensors:
    """Return the global tensors that the ranks' pieces make up; ``CoverageError``, listing all, where they do not.

    Args:
        reports: what ``describe_shard`` returned on each rank.
        is_whole: nothing is stored elsewhere, so that there must be no holes.
    """
    told: defaultdict[str, list[tuple[int, StoredTensor]]] = defaultdict(list)
    places: dict[tuple[str, int], tuple[int, int, int]] = {}  # by file and first byte
    for rank, report in enumerate(reports):
        tensors = {name: StoredTensor.from_json(node) for name, node in json.loads(report).items()}
        for name, tensor in tensors.items():
            told[name].append((rank, tensor))
        pieces = [piece for tensor in tensors.values() for piece in tensor.pieces]
        first = 0
        for piece in sorted(pieces, key=lambda piece: piece.begin):
            end = first - (piece.begin - piece.end) // CHUNK_BYTES
            places[piece.file, piece.begin] = rank, first, end
            first = end
    merged = _merged(told, is_whole)
    texts = to_text({name: tensor.to_json() for name, tensor in merged.items()}).split(_NO_CHECKSUMS)
    in_order = [places[piece.file, piece.begin] for tensor in merged.values() for piece in tensor.pieces]
    return MergedTensors(merged, texts, in_order)


def _merged(told: Mapping[str, Sequence[tuple[int, StoredTensor]]], is_whole: bool) -> dict[str, StoredTensor]:
    """Return the tensors that ranks tell of, each with the pieces of all."""
    problems, merged = [], {}
    for name, versions in told.items():
        first_rank, first = versions[0]
        for rank, other in versions[1:]:
            if (other.dtype, other.shape) != (first.dtype, first.shape):
                problems.append(f"{name}: rank {first_rank} has {_describe(first)} and rank {rank} {_describe(other)}")
                break
        else:
            pieces = [(rank, piece) for rank, tensor in versions for piece in tensor.pieces]
            problems += _coverage_problems(name, first.shape, pieces) if is_whole else ()
            ordered = sorted((piece for _, piece in pieces), key=lambda piece: piece.offset)
            merged[name] = StoredTensor(dtype=first.dtype, shape=first.shape, pieces=tuple(ordered))
    _raise_coverage(problems)
    return merged


def check_coverage(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``CoverageError``, listing all, where pieces do not tile their tensor."""
    flaws = {name: find_flaw([piece.box for piece in tensor.pieces], tensor.shape) for name, tensor in tensors.items()}
    _raise_coverage(
        f"{name}: of the shape {tensors[name].shape} the element {flaw[0]} is stored {flaw[1]} times"
        for name, flaw in flaws.items()
        if flaw is not None
    )


def _raise_coverage(problems: Iterable[str]) -> None:
    text = "\n".join(problems)
    if text:
        raise CoverageError(f"the ranks' pieces do not make up the tensors:\n{text}")


def _coverage_problems(name: str, shape: tuple[int, ...], pieces: Sequence[tuple[int, StoredPiece]]) -> Iterable[str]:
    flaw = find_flaw([piece.box for _, piece in pieces], shape)
    if flaw is not None:
        index, _ = flaw
        holders = [
            rank
            for rank, piece in pieces
            if all(start <= at < start + size for at, start, size in zip(index, piece.offset, piece.shape, strict=True))
        ]
        by_whom = f"by the ranks {holders}" if holders else "by no rank; do its owners all pass it?"
        yield f"{name}: of the shape {shape} the element {index} is stored {by_whom}"


def _describe(tensor: StoredTensor) -> str:
    return f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}"
