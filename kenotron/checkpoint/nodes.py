"""Nodes that share no file system: each keeps what its own ranks hold, and all publish or none does.

The ranks of a node meet in its folder (``meeting.py``). Then their leaders agree through a key-value store:

1. each: its part is durable, manifest included, and nobody on the node can fail any more: tell what it holds.
2. node 0: do the parts make up every tensor? Then "publish", else the failure. Whoever fails first may say so as well; the
   first word counts (``compare_set``).
3. each: rename; say so; return when all have. What was replaced, and older checkpoints, are removed no earlier. Who cannot
   rename tells the others, which take theirs back.

Where the store or a node dies between 2 and 3, some parts are published and others lie ready. Nothing is removed then, and
``recover`` brings all nodes to the same one when they start again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
import zlib
from base64 import b85decode, b85encode
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from kenotron.checkpoint.boxes import Box, find_flaw
from kenotron.checkpoint.errors import CheckpointError, CoverageError, NotACheckpointError, SaveFailedError
from kenotron.checkpoint.format import MANIFEST, unpublished_name
from kenotron.checkpoint.manifest import NodePart, StoredTensor, is_checkpoint, parse_manifest, read_manifest
from kenotron.checkpoint.meeting import CONTROL, PUBLISH, Meeting, failing, is_dead, raise_failure
from kenotron.durable import fsync_directory, make_directories, put_in_place
from kenotron.files import read_regular

_STORE_PREFIX = "kenotron/checkpoints"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a job, seen from one of them.

    Args:
        store: that all ranks reach, such as the one of the default process group.
        index: of this node. count: how many there are.
        ranks: those of this node, ascending.

    Raises:
        ValueError: an index out of range, or no ranks.
    """

    store: dist.Store
    index: int
    count: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"index={self.index} must be a node from 0 to {self.count - 1}")
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"ranks={self.ranks} must be those of node {self.index}, ascending, and at least one")

    @property
    def part(self) -> NodePart:
        """What the manifest tells of it."""
        return NodePart(index=self.index, count=self.count, ranks=self.ranks)


class InDoubtError(SaveFailedError):
    """Whether the other nodes have published their parts of a save cannot be told; ``recover`` will see."""


class Council:
    """A node's voice in one save; its leader's.

    Args:
        nodes: who takes part. save_id: of the save. meeting: of this node's ranks, with its limits of time.
    """

    def __init__(self, nodes: Nodes, save_id: str, meeting: Meeting) -> None:
        self._nodes = nodes
        self._store = dist.PrefixStore(f"{_STORE_PREFIX}/{save_id}", nodes.store)
        self._meeting = meeting
        self._has_told = self._has_decided = self._has_published = False

    def wait_for_start(self, within_s: float | None) -> None:
        """Return when all nodes have begun; at once where no limit is given."""
        self._put(f"begun/{self._nodes.index}", "yes")
        if within_s is not None:
            self._wait(lambda: not self._missing("begun"), within_s, lambda: f"nodes {self._missing('begun')} never began")

    def agree(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Return when all nodes are ready and what they hold is the whole; then all publish.

        Raises:
            SaveFailedError: a node failed, the parts do not belong together, or time is up; the same on all nodes.
            InDoubtError: the store is gone.
        """
        told = {"tensors": {name: _described(tensor) for name, tensor in tensors.items()}}
        self._put(f"part/{self._nodes.index}", b85encode(zlib.compress(json.dumps(told).encode())).decode())
        self._has_told = True
        if self._nodes.index == 0:
            self._wait(lambda: not self._missing("part"), None, lambda: f"nodes {self._missing('part')} are not ready")
            _check_whole([self._take_part(node) for node in range(self._nodes.count)])
            self._decide(PUBLISH)
        self._wait(lambda: self._verdict() is not None, None, lambda: "node 0 has not decided")
        self._raise_failure()
        self._has_decided = True

    def confirm(self) -> None:
        """Say that this node has published; return when all have.

        Raises:
            SaveFailedError: a node could not, so that this one is to take its own part back.
            InDoubtError: a node, or the store, is silent.
        """
        self._has_published = True
        self._put(f"published/{self._nodes.index}", "yes")
        self._wait(lambda: not self._missing("published"), None, lambda: f"nodes {self._missing('published')} are silent")
        for node in range(self._nodes.count):
            said = self._get(f"published/{node}")
            if said != b"yes":
                self._has_told = False  # nor is there here
                raise_failure(json.loads(said))

    def tell(self, error: SaveFailedError) -> None:
        """Tell the other nodes that this one has failed, unless it was one of them that did."""
        with suppress(dist.DistError, RuntimeError):  # without a store there is nobody to tell
            if not self._has_decided:
                self._decide(failing(error))
            elif not self._has_published:
                self._put(f"published/{self._nodes.index}", json.dumps(failing(error)))
                self._has_told = False  # what is told takes all back: no doubt is left

    def is_in_doubt(self) -> bool:
        """Tell whether other nodes may publish, or have published, although this one fails."""
        if not self._has_told:
            return False
        if self._has_decided:
            return True
        try:
            return self._verdict() in (None, PUBLISH)
        except InDoubtError:
            return True

    # ---------------------------------------------------------------------------------------------------------- store

    def _wait(self, is_done: Callable[[], bool], within_s: float | None, who_is_missing: Callable[[], str]) -> None:
        def is_over() -> bool:
            self._raise_failure()
            return is_done()

        self._meeting.wait_until(is_over, within_s, who_is_missing, may_extend=False)

    def _decide(self, verdict: Mapping[str, str]) -> None:
        self._ask(lambda: self._store.compare_set("verdict", "", json.dumps(verdict)))

    def _verdict(self) -> dict[str, str] | None:
        if not self._has("verdict"):
            return None
        verdict: dict[str, str] = json.loads(self._get("verdict"))
        return verdict

    def _raise_failure(self) -> None:
        raise_failure(self._verdict())

    def _take_part(self, node: int) -> dict[str, Any]:
        key = f"part/{node}"
        part: dict[str, Any] = json.loads(zlib.decompress(b85decode(self._get(key))))
        self._ask(lambda: self._store.delete_key(key))  # it is large, and nobody else reads it
        return part

    def _missing(self, kind: str) -> list[int]:
        return [node for node in range(self._nodes.count) if not self._has(f"{kind}/{node}")]

    def _has(self, key: str) -> bool:
        found: bool = self._ask(lambda: self._store.check([key]))
        return found

    def _put(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def _get(self, key: str) -> bytes:
        found: bytes = self._ask(lambda: self._store.get(key))
        return found

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (dist.DistError, RuntimeError) as error:
            raise InDoubtError(f"saving {self._meeting.path}: the nodes' store does not answer: {error}") from error


def _described(tensor: StoredTensor) -> list[Any]:
    return [str(tensor.dtype), tensor.shape, [[piece.offset, piece.shape] for piece in tensor.pieces]]


def _check_whole(parts: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``SaveFailedError`` unless the nodes' parts make up every tensor."""
    boxes: defaultdict[str, set[Box]] = defaultdict(set)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    problems = []
    for node, part in enumerate(parts):
        for name, (dtype, shape, held) in part["tensors"].items():
            if name.startswith("state/"):  # each node has its own
                continue
            boxes[name].update(Box(tuple(offset), tuple(extents)) for offset, extents in held)
            if kinds.setdefault(name, (dtype, tuple(shape))) != (dtype, tuple(shape)):
                problems.append(f"{name}: {kinds[name]} on one node and {dtype, tuple(shape)} on node {node}")
    for name, found in boxes.items():  # nodes that hold the same boxes are replicas of one another
        flaw = find_flaw(sorted(found), kinds[name][1])
        if flaw is not None:
            problems.append(f"{name}: of the shape {kinds[name][1]} the element {flaw[0]} is in {flaw[1]} of the nodes' boxes")
    if problems:
        raise CoverageError("\n".join(["the nodes' parts do not make up the tensors:", *problems]))


# ------------------------------------------------------------------------------------------------------------ recovery


class _Found(NamedTuple):
    """A complete part in a folder. ``of``: the save that its directory is named after, None where it is published."""

    name: str
    save_id: str
    of: str | None
    directory: str


def recover(folder: Path, exchange: Callable[[Any], Sequence[Any]], *, leads: bool) -> list[Path]:
    """Bring the nodes to the same checkpoints after a crash between their renames; all ranks call it at the start.

    A part that lies ready, while another node has published its own, is published where all nodes have theirs. Where one
    has not, what was replaced by the others' takes its place again.

    Args:
        folder: of the checkpoints, on this node.
        exchange: returns what each rank passes, such as an all-gather of objects.
        leads: whether this rank acts for its node.

    Returns:
        What was put in place.
    """
    own = _look(folder) if leads else None
    nodes = [[_Found(*each) for each in found] for found in exchange(own) if found is not None]
    held = [{(each.name, each.save_id) for each in found} for found in nodes]
    published = {(each.name, each.save_id) for found in nodes for each in found if each.of is None}
    moved = []
    for each in own or ():
        this, newer = (each.name, each.save_id), (each.name, each.of)
        if each.of is None or newer not in published or not all(this in found for found in held):
            continue
        if this == newer or not all(newer in found for found in held):
            put_in_place(folder / each.directory, folder / each.name, folder / f".{each.name}.{each.of}.replaced")
            shutil.rmtree(folder / each.name / CONTROL, ignore_errors=True)
            fsync_directory(folder)
            moved.append(folder / each.name)
    exchange(None)  # nobody goes on before all have done so
    return moved


def common_path(path: str | os.PathLike[str], exchange: Callable[[Any], Sequence[Any]]) -> Path:
    """Return the newest of the checkpoints that ranks are about to load which all of them have; all ranks call it.

    Nodes that looked for the last one, each on its own disk, may have found different ones.

    Args:
        path: what this rank would load. exchange: as for ``recover``.

    Raises:
        NotACheckpointError: there is none that all have. The text tells what each would load.
    """
    wanted = [str(each) for each in exchange(str(path))]
    own = {each: _identity(Path(each)) for each in dict.fromkeys(wanted)}
    told: Sequence[dict[str, tuple[str, float] | None]] = exchange(own)
    common = [each for each, first in told[0].items() if first and all(i and i[0] == first[0] for i in (t[each] for t in told))]
    if not common and any(any(each.values()) for each in told):
        lines = [f"rank {rank}: {each} (save id {(told[rank][each] or ('none',))[0]})" for rank, each in enumerate(wanted)]
        raise NotACheckpointError("\n".join(["no checkpoint is on all nodes; they would load:", *lines]))
    return Path(max(common, key=lambda each: (told[0][each] or ("", 0.0))[1], default=str(path)))


def _identity(path: Path) -> tuple[str, float] | None:
    if not is_checkpoint(path):
        return None
    return read_manifest(path, check_files=False).save_id, (path / MANIFEST).stat().st_mtime


def check_sharing(
    folder: Path, exchange: Callable[[Any], Sequence[Any]], *, leader: int, rank: int, node_local: bool, patience_s: float = 5.0
) -> None:
    """Raise ``ValueError`` on all ranks where a folder is shared and should not be, or the reverse; all ranks call it.

    The leader of each node leaves a file, and all look whose they see.

    Args:
        folder: of the checkpoints. exchange: as for ``recover``.
        leader: the rank that acts for this rank's node. rank: this one.
        node_local: whether each node should have a folder of its own.
        patience_s: how long a file may take to be seen, as on a network file system.
    """
    name = str(exchange(uuid.uuid4().hex)[0])
    probes = {each: folder / f".{name}.{each}.probe" for each in exchange(leader)}
    if rank == leader:
        with suppress(OSError):  # saving will tell
            make_directories(folder)
            probes[rank].touch()
    exchange(None)
    deadline = time.monotonic() + patience_s
    expected = [leader] if node_local else list(probes)
    while not all(probes[each].exists() for each in expected) and time.monotonic() < deadline:
        time.sleep(0.05)
    seen = exchange([each for each, probe in probes.items() if probe.exists()])
    if rank == leader:
        with suppress(OSError):
            probes[rank].unlink()
    if node_local and len(probes) > 1 and any(len(found) > 1 for found in seen):
        raise ValueError(
            f"node_local=True, but nodes share {folder} (ranks see the files of ranks {max(seen, key=len)}), where their parts "
            "would overwrite each other. Leave node_local out, or choose a folder on a disk of each node's own."
        )
    blind = [each for each, found in enumerate(seen) if len(found) < len(probes)]
    if not node_local and blind and any(seen):
        raise ValueError(
            f"{folder} is not the same directory on all nodes: ranks {blind} do not see what the others write there. Choose "
            "one on a file system that all share, or set CheckpointSettings(node_local=True)."
        )


def _look(folder: Path) -> list[_Found]:
    found = []
    for directory in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = unpublished_name(directory.name)
        if not directory.is_dir() or (name is not None and not is_dead(directory)):
            continue
        try:
            manifest = parse_manifest(read_regular(directory / MANIFEST), directory)
        except (OSError, CheckpointError):
            continue
        if manifest.node is None or not all((directory / file).is_file() for file in manifest.files):
            continue
        of = None if name is None else directory.name.removeprefix(f".{name}.").rpartition(".")[0]
        found.append(_Found(name or directory.name, manifest.save_id, of, directory.name))
    return found
