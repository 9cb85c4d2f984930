"""Bring the parts of a checkpoint that nodes without a common file system hold into one directory, for any layout to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.errors import MismatchError
from kenotron.checkpoint.format import unpublished
from kenotron.checkpoint.manifest import Manifest, StoredPiece, read_manifest
from kenotron.checkpoint.meeting import FolderLock
from kenotron.checkpoint.reports import check_coverage
from kenotron.checkpoint.save import check_replaceable, publish_alone, remove_tree
from kenotron.durable import copy_durably


def merge(parts: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Manifest:
    """Make one checkpoint of the parts of all nodes. The parts stay as they are.

    Args:
        parts: the directories of all nodes, in any order.
        path: the directory to make; a checkpoint that stands there is replaced.

    Raises:
        ValueError: something that is no checkpoint stands at ``path``, or ``parts`` is empty.
        MismatchError: they are not the parts of one save, or not all of them.
        CheckpointError: a part is damaged, or they leave holes.
    """
    target = Path(os.path.abspath(path))
    check_replaceable(target)
    manifests = _in_order([read_manifest(part) for part in parts])
    merged = _merged(manifests, target)
    check_coverage(merged.tensors)
    folder = unpublished(target, merged.save_id)
    remove_tree(folder)
    lock = FolderLock(folder)
    for name in merged.files:
        source = next(manifest.path / name for manifest in manifests if name in manifest.files)
        copy_durably(source, folder / name)
    publish_alone(merged, lock)
    return merged


def _in_order(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the parts in the order of their nodes, if they are those of one checkpoint."""
    if not manifests:
        raise ValueError("parts is empty; pass the directory of each node")
    problems = [f"{each.path} is whole, not the part of a node" for each in manifests if each.node is None]
    problems += [
        f"{each.path} was saved as {each.save_id} and {manifests[0].path} as {manifests[0].save_id}"
        for each in manifests
        if each.save_id != manifests[0].save_id
    ]
    nodes = sorted((each.node for each in manifests if each.node is not None), key=lambda node: node.index)
    if not problems and [node.index for node in nodes] != list(range(nodes[0].count)):
        problems.append(f"these are the nodes {[node.index for node in nodes]} of {nodes[0].count}; each is needed once")
    if problems:
        raise MismatchError("\n".join(["these are not the parts of one checkpoint:", *problems]), tuple(problems))
    return sorted(manifests, key=lambda each: -1 if each.node is None else each.node.index)


def _merged(ordered: Sequence[Manifest], path: Path) -> Manifest:
    """Return the manifest of all parts. Of what several nodes hold alike the first counts."""
    first = ordered[0]
    states: list[Any] = list(first.rank_states)
    tensors = dict(first.tensors)
    for other in ordered[1:]:
        for rank in other.node.ranks if other.node is not None else ():
            states[rank] = other.rank_states[rank]
        for name, tensor in other.tensors.items():
            if name in tensors and name.startswith("state/"):  # each node has its own
                continue
            if name in tensors:
                pieces: dict[Box, StoredPiece] = {piece.box: piece for piece in (*tensor.pieces, *tensors[name].pieces)}
                tensor = replace(tensor, pieces=tuple(pieces[box] for box in sorted(pieces)))
            tensors[name] = tensor
    used = {piece.file for tensor in tensors.values() for piece in tensor.pieces}
    shards = {piece.file for each in ordered for tensor in each.tensors.values() for piece in tensor.pieces}
    sizes = {name: size for each in reversed(ordered) for name, size in each.files.items()}
    return replace(
        first,
        path=path,
        files={name: size for name, size in sizes.items() if name in used or name not in shards},
        tensors=tensors,
        aliases={name: stored for each in ordered for name, stored in each.aliases.items() if name not in tensors},
        origins={name: save_id for each in ordered for name, save_id in each.origins.items() if name in used},
        rank_states=tuple(states),
        is_merged=True,
        node=None,
    )
