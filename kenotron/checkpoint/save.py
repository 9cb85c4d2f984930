"""Save a checkpoint: every rank writes what it owns, rank 0 checks the whole and publishes it with one rename.

1. all ranks: say in the unpublished directory ``.<name>.<save id>.partial`` that they take part.
2. all ranks: write ``shard-NNNNN-of-MMMMM.safetensors`` (reserved at full size first) and fsync it.
3. all ranks: report what the shard holds, in a file.
4. rank 0: when all have reported, check that every global tensor is covered exactly once; write ``manifest.json``;
   fsync it and the directory; rename the directory to its final name; fsync the parent; remove what it replaced.
5. other ranks: return once they see it published, or raise what went wrong, which is the same on all ranks.

There is no collective in it: see ``meeting.py``. A failure or a crash at any point leaves the former checkpoint
in place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kenotron.checkpoint.boxes import Box
from kenotron.checkpoint.errors import SaveFailedError
from kenotron.checkpoint.format import (
    DTYPE_NAMES,
    MANIFEST,
    RESERVED_PREFIXES,
    SAVE_ID,
    LocalTensor,
    Piece,
    ShardEntry,
    ShardLayout,
    box_of,
    dtype_name,
    lay_out,
    unpublished,
    unpublished_name,
)
from kenotron.checkpoint.manifest import Manifest, StoredTensor, check_file_size, is_checkpoint
from kenotron.checkpoint.meeting import FolderLock, Meeting
from kenotron.checkpoint.nodes import Council, Nodes
from kenotron.checkpoint.readme import README, TEXT
from kenotron.checkpoint.reports import describe_shard, merge
from kenotron.checkpoint.values import Attachments, encode
from kenotron.checkpoint.writer import ShardWriter, SyncShardWriter
from kenotron.durable import fsync_directory, put_in_place, write_durably
from kenotron.files import local_path

#: Of each entry of a shard the CRC-32C of each of its chunks.
Checksums = Sequence[Sequence[int]]


def save(
    path: str | os.PathLike[str],
    tensors: Sequence[LocalTensor],
    state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    save_id: str,
    rank_state: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    timeout_s: float = 600.0,
    start_timeout_s: float | None = None,
    writer: ShardWriter | None = None,
    aliases: Mapping[str, str] | None = None,
    nodes: Nodes | None = None,
    ended: Callable[[], Collection[int]] = tuple,
) -> None:
    """Write a checkpoint together with the other ranks; return when it is published and durable.

    Args:
        path: the checkpoint's directory, on a file system that all ranks share (see ``nodes``). A checkpoint that stands
            there is replaced; anything else that stands there is left alone and the save refused. It must not be removed
            or replaced before all ranks have returned.
        tensors: what this rank holds. Of ranks that hold the same pieces, one writes them.
        state: nested values that all ranks share; that of rank 0 is stored. See ``values.py`` for what it may hold.
        rank_state: nested values of this rank alone, such as the state of its random number generators.
        rank, world_size: who this is, and how many call.
        save_id: the same on all ranks and never used before: up to 64 letters, digits, ``_`` and ``-``.
        allow_pickle: store what JSON cannot hold as pickles, and leave out what can't be pickled, with a warning; loading
            pickles also takes ``allow_pickle=True``.
        timeout_s: how long the whole save may take.
        start_timeout_s: write nothing before all ranks have begun, and give up if they have not within so long. For
            saves on a path where other ranks may be dead.
        writer: how the shard's bytes reach the disk.
        aliases: further names of tensors (tied weights) -> the name that they are saved under; rank 0's are stored.
        nodes: where nodes share no file system: each stores what its own ranks hold, and all publish or none does.
        ended: tells, from any thread, which ranks' processes are gone: they are not waited for.

    Raises:
        ValueError: an argument that cannot be honoured, on the rank that got it.
        SaveFailedError: anything else (no room, ranks missing, pieces that do not tile their tensor, a ``ValueError``
            on another rank); the same type and text on all ranks.
    """
    attempt = SaveAttempt(
        path,
        rank=rank,
        world_size=world_size,
        save_id=save_id,
        timeout_s=timeout_s,
        start_timeout_s=start_timeout_s,
        aliases=aliases,
        nodes=nodes,
        ended=ended,
    )
    used = writer or SyncShardWriter()
    former = attempt.run(
        lambda: attempt.gather(tensors, state, rank_state, allow_pickle=allow_pickle),
        lambda file, layout: used.write(file, layout.header, layout.buffers(), num_bytes=layout.num_bytes),
    )
    if former is not None:
        remove_tree(former)


class SaveAttempt:
    """One rank's part of one save. Arguments as ``save``.

    Attributes:
        origin: the ``save_id`` of the save that wrote the shard, if it is a link to that one's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        save_id: str,
        timeout_s: float,
        start_timeout_s: float | None,
        aliases: Mapping[str, str] | None,
        nodes: Nodes | None,
        ended: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.path = Path(os.path.abspath(local_path(path, "The checkpoint")))
        ranks = range(world_size) if nodes is None else nodes.ranks
        _check_arguments(self.path, rank, world_size, save_id, ranks)
        self._rank, self._world_size, self.save_id = rank, world_size, save_id
        self._aliases = aliases or {}
        self._nodes = nodes
        self._start_timeout_s = start_timeout_s
        self._part = _Part(rank=rank, world_size=world_size, save_id=save_id, ranks=ranks)
        self._meeting = Meeting(
            self.path,
            save_id,
            rank=rank,
            ranks=ranks,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            may_be_taken_back=nodes is not None,
            ended=ended,
        )
        self._council = Council(nodes, save_id, self._meeting) if nodes is not None and self._meeting.leads else None
        self.origin: str | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank checks and publishes, for all ranks or for those of its node."""
        return self._meeting.leads

    def hurry(self, within_s: float) -> None:
        """Do not wait for ranks that may be dead much longer than this rank needs: see ``Meeting.hurry``."""
        self._meeting.hurry(within_s)

    def gather(
        self,
        tensors: Sequence[LocalTensor],
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None,
        *,
        allow_pickle: bool,
        is_lazy: Callable[[torch.Tensor], bool] = lambda tensor: False,
        stored: Mapping[int, str] | None = None,
    ) -> ShardLayout:
        """Encode the state as it is now, and lay out the shard. Nothing of the tensors is read yet.

        Args:
            is_lazy: tells of tensors inside of the states whether they change in optimizer steps alone.
            stored: by ``id``, parameters that are saved whole, and under which names: pickles refer to them.

        Raises:
            ValueError: something that cannot be stored.
        """
        _check_tensors(tensors, self._rank)
        return self._part.gather(tensors, state, rank_state, allow_pickle, is_lazy, stored or {})

    def run(self, gather: Callable[[], ShardLayout], write: Callable[[Path, ShardLayout], Checksums]) -> Path | None:
        """Save together with the other ranks; return when the checkpoint is published and durable.

        Args:
            gather: returns what ``self.gather`` made. What it raises reaches the other ranks as well.
            write: creates the shard's file, durably, and returns the checksums of each entry.

        Returns:
            What the checkpoint has replaced, which is to be removed; on the rank that leads.

        Raises:
            ValueError, SaveFailedError: as ``save``.
        """
        meeting = self._meeting
        try:
            meeting.begin()
            if self.leads:
                meeting.sweep()
                check_replaceable(self.path)
            meeting.wait_for_start()
            if self._council is not None:
                self._council.wait_for_start(self._start_timeout_s)
            layout = gather()
            report = self._part.write(meeting.folder, layout, write)
            origins = {} if self.origin is None else {self._part.shard: self.origin}
            meeting.report(report | {"origins": origins})
            if self.leads:
                return self._publish()
            meeting.wait_for_publication()
            fsync_directory(self.path.parent)
            return None
        except BaseException as error:
            if self._council is not None:
                self._council.tell(meeting.describe(error))
            keep = self._council is not None and self._council.is_in_doubt()
            agreed = meeting.withdraw(error, self._part.files, keep=keep)
            if isinstance(error, ValueError) or not isinstance(error, Exception) or str(error) == str(agreed):
                raise
            raise agreed from error
        finally:
            meeting.end()

    def _publish(self) -> Path | None:
        """Check the reports, write the manifest and give the directory its final name. Return what it replaced."""
        meeting, council = self._meeting, self._council
        reports = meeting.wait_for_reports()
        tensors = merge(tuple(report["tensors"] for report in reports), self._nodes is None)
        manifest = self._manifest(reports, tensors.tensors)
        for name, size in manifest.files.items():
            check_file_size(meeting.folder / name, size)
        text = tensors.to_json([report["crc32c"] for report in reports])
        write_durably(meeting.folder / README, TEXT.encode())
        write_durably(meeting.folder / MANIFEST, manifest.to_bytes(text))
        fsync_directory(meeting.folder)
        check_replaceable(self.path)
        meeting.decide_to_publish()
        if council is not None:
            council.agree(manifest.tensors)
        former = put_in_place(meeting.folder, self.path, unpublished(self.path, self.save_id, "replaced"))
        fsync_directory(self.path.parent)
        if council is not None:
            self._confirm(council, former)
        meeting.clear()
        return former

    def _manifest(self, reports: Sequence[Mapping[str, Any]], tensors: Mapping[str, StoredTensor]) -> Manifest:
        states: list[Any] = [None] * self._world_size
        for rank, report in zip(self._part.ranks, reports, strict=True):
            states[rank] = report["rank_state"]
        return Manifest(
            path=self.path,
            save_id=self.save_id,
            world_size=self._world_size,
            files={name: size for report in reports for name, size in report["files"].items()},
            tensors=tensors,
            origins={file: save_id for report in reports for file, save_id in report["origins"].items()},
            aliases={name: stored for name, stored in self._aliases.items() if stored in tensors and name not in tensors},
            state=reports[0]["state"],
            rank_states=tuple(states),
            node=None if self._nodes is None else self._nodes.part,
        )

    def _confirm(self, council: Council, former: Path | None) -> None:
        """Return when all nodes have published; where one cannot, take this node's part back."""
        try:
            council.confirm()
        except SaveFailedError:
            if not council.is_in_doubt():
                if former is None:
                    os.rename(self.path, self._meeting.folder)
                else:
                    put_in_place(former, self.path, self._meeting.folder)
                fsync_directory(self.path.parent)
            raise


class _Part:
    """What one rank contributes: its shard, its pickles and the report about them."""

    def __init__(self, *, rank: int, world_size: int, save_id: str, ranks: Sequence[int]) -> None:
        self._rank, self.ranks = rank, ranks
        self._metadata = {"format": "pt", "save_id": save_id}  # transformers insists on the first
        self.shard = f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"
        self._pickles: dict[str, bytes] = {}
        self._states: dict[str, Any] = {}
        self._described: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    @property
    def files(self) -> list[str]:
        """The files that it writes."""
        return [self.shard, *self._pickles]

    def gather(
        self,
        tensors: Sequence[LocalTensor],
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None,
        allow_pickle: bool,
        is_lazy: Callable[[torch.Tensor], bool],
        stored: Mapping[int, str],
    ) -> ShardLayout:
        """Encode the state and lay out all that this rank writes."""
        extra: list[LocalTensor] = []
        entries: list[ShardEntry] = []
        sources = [("rank_state", f"rank_state/{self._rank}/", f"pickle-{self._rank}-", rank_state)]
        if self._rank == self.ranks[0]:
            sources.append(("state", "state/", "pickle-", state))
        for key, tensor_prefix, pickle_prefix, source in sources:
            if source is None:
                self._states[key] = None
                continue
            found = Attachments(tensor_prefix=tensor_prefix, pickle_prefix=pickle_prefix, stored=stored)
            self._states[key] = encode(dict(source), found, allow_pickle=allow_pickle)
            if found.left_out:
                warnings.warn(f"checkpoints lack what not even pickle can hold: {'; '.join(found.left_out)}", stacklevel=2)
            extra += [
                LocalTensor.whole(name, tensor, (self._rank,), lazy=is_lazy(tensor)) for name, tensor in found.tensors.items()
            ]
            self._pickles |= found.pickles
        for tensor in (*tensors, *extra):
            dtype = tensor.tensor.dtype
            if dtype not in DTYPE_NAMES:
                dtype_name(dtype, tensor.name)  # raises here, not on the worker
            self._described.append((tensor.name, dtype, tensor.global_shape))
            for piece in tensor.pieces:
                if 0 not in piece.shape and self._writer_of(tensor, piece) == self._rank:
                    local = tensor.tensor.detach()
                    data = local if piece.shape == local.shape else box_of(local, Box(piece.local, piece.shape))
                    entries.append(ShardEntry(tensor.name, tensor.global_shape, piece.offset, data, tensor.lazy))
        return lay_out(entries, self._metadata)

    def write(self, folder: Path, layout: ShardLayout, write: Callable[[Path, ShardLayout], Checksums]) -> dict[str, Any]:
        """Write the files durably and return the report."""
        checksums = write(folder / self.shard, layout)
        told = {
            "tensors": describe_shard(self.shard, tuple(self._described), layout.plan, len(layout.header)),
            "crc32c": list(itertools.chain.from_iterable(checksums)),
        }
        for name, data in self._pickles.items():
            write_durably(folder / name, data)
        sizes = {name: len(data) for name, data in self._pickles.items()}
        return self._states | told | {"files": {self.shard: layout.num_bytes} | sizes}

    def _writer_of(self, tensor: LocalTensor, piece: Piece) -> int:
        """Return the owner that writes it: by a rule that all can follow alone. Whose load is least none of them knows."""
        holders = tensor.owners if piece.owners is None else piece.owners
        if len(holders) == 1:
            return holders[0]
        owners = [owner for owner in sorted(holders) if owner in self.ranks]
        return owners[zlib.crc32(tensor.name.encode()) % len(owners)]


def _check_arguments(path: Path, rank: int, world_size: int, save_id: str, ranks: Sequence[int]) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie between 0 and world_size={world_size}, exclusive")
    if rank not in ranks:
        raise ValueError(f"rank={rank} is not one of its node's ranks {tuple(ranks)}")
    if not SAVE_ID.fullmatch(save_id):
        raise ValueError(f"save_id={save_id!r} must be 1 to 64 letters, digits, '_' or '-'; uuid.uuid4().hex will do")
    if unpublished_name(path.name):
        raise ValueError(f"{path} is named like an unpublished checkpoint; choose another name")


def _check_tensors(tensors: Sequence[LocalTensor], rank: int) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are named {tensor.name!r}; give each its own name")
        seen.add(tensor.name)
        if tensor.name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"{tensor.name}: names may not begin with {' or '.join(RESERVED_PREFIXES)}; rename it")
        if rank not in tensor.owners:
            raise ValueError(f"{tensor.name}: rank {rank} passes it but is none of its owners {tensor.owners}; add it")


def check_replaceable(path: Path) -> None:
    """Raise ``ValueError`` where something stands at ``path`` that a checkpoint must not replace."""
    if not path.exists() or is_checkpoint(path) or (path.is_dir() and not any(path.iterdir())):
        return
    raise ValueError(f"{path} exists and is not a checkpoint; choose another path, or remove it first")


def publish_alone(manifest: Manifest, lock: FolderLock) -> None:
    """Give the directory that ``lock`` marks, whose files are durable, its manifest and its name; remove what it replaces."""
    folder, path = lock.folder, manifest.path
    for name, num_bytes in manifest.files.items():
        check_file_size(folder / name, num_bytes)
    write_durably(folder / README, TEXT.encode())
    write_durably(folder / MANIFEST, manifest.to_bytes())
    lock.remove()
    fsync_directory(folder)
    former = put_in_place(folder, path, unpublished(path, manifest.save_id, "replaced"))
    fsync_directory(path.parent)
    if former is not None:
        remove_tree(former)


def remove_tree(path: Path) -> None:
    """Delete a folder that is no longer a checkpoint, or a link; warn where that fails."""
    with contextlib.suppress(OSError):  # `ignore_errors` of Python 3.11 does not cover closing
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        warnings.warn(f"{path} is no longer wanted and could not be removed; remove it by hand", stacklevel=3)
