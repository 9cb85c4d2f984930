"""``torch.distributed.checkpoint`` on Kénotron's format and engine, by one argument.

```python
dcp.save(state_dict, storage_writer=KenotronStorageWriter(path))        # dcp.async_save takes it as well
dcp.load(state_dict, storage_reader=KenotronStorageReader(path))
```

Who holds what, and who writes it, is decided by DCP's planners; so are its collectives. From there on:

1. coordinator, ``prepare_global_plan``: makes the unpublished directory and tells all ranks its name.
2. all ranks, ``write_data``: write their shard through the engine, durably.
3. coordinator, ``finish``: checks that the pieces cover each tensor, writes the manifest, renames the directory.

A checkpoint of ``KenotronStrategy`` can be read as well: its weights are named ``model/...`` (``prefix="model/"``).
"""

from __future__ import annotations

import dataclasses
import io
import os
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kenotron.callbacks_native import Engine
from kenotron.checkpoint.engine import EngineSettings
from kenotron.checkpoint.format import RESERVED_PREFIXES, LocalTensor, Piece, ShardEntry, lay_out, unpublished
from kenotron.checkpoint.load import load_into, load_state
from kenotron.checkpoint.manifest import Manifest, StoredPiece, StoredTensor, read_manifest
from kenotron.checkpoint.meeting import FolderLock
from kenotron.checkpoint.reports import check_coverage
from kenotron.checkpoint.save import check_replaceable, publish_alone
from kenotron.checkpoint.sources import Sources
from kenotron.checkpoint.values import Attachments, encode

_KEY = "torch.distributed.checkpoint"


@dataclasses.dataclass(frozen=True)
class _Save:
    """What the coordinator tells each rank: which save this is, and who of how many it is in it."""

    save_id: str
    rank: int
    world_size: int


@dataclasses.dataclass(frozen=True)
class _Written:
    """What a rank tells of one item: where a piece lies, or the bytes themselves."""

    file: str
    num_bytes: int
    begin: int = 0
    end: int = 0
    shape: tuple[int, ...] = ()
    crc32c: tuple[int, ...] = ()
    content: bytes | None = None


class KenotronStorageWriter(StorageWriter):
    """Writes what ``dcp.save`` or ``dcp.async_save`` hands over, checksummed, durably and published by one rename.

    Args:
        path: the checkpoint's directory, which all ranks see; None to take the ``checkpoint_id`` of each call.
        engine: memory, threads and bandwidth that writing may use.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, engine: EngineSettings | None = None) -> None:
        super().__init__()
        self._path = None if path is None else Path(os.path.abspath(path))
        self._settings = engine or EngineSettings()
        self._engine: Engine | None = None
        self._lock: FolderLock | None = None
        self._save: _Save | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None, "_lock": None}  # dcp.async_save may hand the writer to another process

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(os.path.abspath(checkpoint_id))
        self._save = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._path is None:
            raise ValueError("no path: pass one to KenotronStorageWriter, or checkpoint_id to the call")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.index.fqn.startswith(RESERVED_PREFIXES):
                raise ValueError(f"{item.index.fqn}: names may not begin with {' or '.join(RESERVED_PREFIXES)}; rename it")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        assert self._path is not None
        check_replaceable(self._path)
        save_id = uuid.uuid4().hex
        self._lock = FolderLock(unpublished(self._path, save_id))
        return [dataclasses.replace(plan, storage_data=_Save(save_id, rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert self._path is not None
        self._save = save = plan.storage_data
        results: list[WriteResult] = []
        entries: dict[str, tuple[ShardEntry, MetadataIndex]] = {}
        name = f"shard-{save.rank + 1:05d}-of-{save.world_size:05d}.safetensors"
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                content = data.getvalue()
                results.append(_result(item.index, len(content), _Written(name, 0, content=content)))
                continue
            assert item.tensor_data is not None and isinstance(data, Tensor)
            offset, tensor = tuple(item.tensor_data.chunk.offsets), data.detach()
            if tensor.numel():
                shape = tuple(item.tensor_data.size)
                entry = ShardEntry(name=item.index.fqn, global_shape=shape, offset=offset, data=tensor, lazy=True)
                entries[entry.key] = entry, item.index
            else:
                results.append(_result(item.index, 0, _Written(name, 0)))
        results += self._write_shard(name, entries, save)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_shard(self, name: str, entries: dict[str, tuple[ShardEntry, MetadataIndex]], save: _Save) -> list[WriteResult]:
        assert self._path is not None
        layout = lay_out([entry for entry, _ in entries.values()], {"format": "pt", "save_id": save.save_id})
        self._engine = self._engine or self._settings.start()
        sources = Sources(layout.entries)
        snapshot = self._engine.submit(layout.header, sources.native, sources)
        snapshot.attach(str(unpublished(self._path, save.save_id) / name))
        snapshot.finish()
        results = []
        for entry, (begin, end), crcs in zip(layout.entries, layout.ranges, snapshot.sums(), strict=True):
            shape = tuple(entry.data.shape)
            written = _Written(name, layout.num_bytes, begin=begin, end=end, shape=shape, crc32c=tuple(crcs))
            results.append(_result(entries[entry.key][1], end - begin, written))
        # A shard without entries is listed as well: otherwise a file would lie there that nobody knows.
        return results or [_result(MetadataIndex(""), 0, _Written(name, layout.num_bytes))]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._path is not None and self._save is not None and self._lock is not None
        written: list[tuple[MetadataIndex, _Written]] = [(r.index, r.storage_data) for rank in results for r in rank]
        files: dict[str, int] = defaultdict(int)
        pieces: dict[str, list[StoredPiece]] = defaultdict(list)
        contents = {index.fqn: data.content for index, data in written if data.content is not None}
        for index, data in written:
            files[data.file] = max(files[data.file], data.num_bytes)
            if data.end > data.begin:
                piece = StoredPiece(
                    file=data.file,
                    begin=data.begin,
                    end=data.end,
                    offset=tuple(index.offset or (0,) * len(data.shape)),
                    shape=data.shape,
                    crc32c=data.crc32c,
                )
                pieces[index.fqn].append(piece)
        tensors = {
            fqn: StoredTensor(
                dtype=stored.properties.dtype,
                shape=tuple(stored.size),
                pieces=tuple(sorted(pieces[fqn], key=lambda piece: piece.offset)),
            )
            for fqn, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        check_coverage(tensors)
        state = {_KEY: {"planner_data": metadata.planner_data, "bytes": contents}}
        manifest = Manifest(
            path=self._path,
            save_id=self._save.save_id,
            world_size=self._save.world_size,
            files=dict(files),
            tensors=tensors,
            state=encode(state, Attachments(tensor_prefix="state/", pickle_prefix="pickle-"), allow_pickle=False),
            rank_states=(None,) * self._save.world_size,
        )
        publish_alone(manifest, self._lock)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._path, save_id=None if self._save is None else self._save.save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


def _result(index: MetadataIndex, num_bytes: int, written: _Written) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=num_bytes, storage_data=written)


class KenotronStorageReader(StorageReader):
    """Reads any checkpoint of the format, checking every byte, into whatever layout ``dcp.load`` is called on.

    Args:
        path: the checkpoint's directory; None to take the ``checkpoint_id`` of each call.
        prefix: which of its tensors; it is taken off their names.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, prefix: str = "") -> None:
        super().__init__()
        self._path = None if path is None else Path(path)
        self._prefix = prefix
        self._manifest: Manifest | None = None
        self._bytes: dict[str, bytes] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id)
        self._manifest = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._path is None:
            raise ValueError("no path: pass one to KenotronStorageReader, or checkpoint_id to the call")
        self._manifest = manifest = read_manifest(self._path)
        # The state of a training holds more than DCP asks for, and may hold what only its own strategy decodes.
        is_ours = isinstance(manifest.state, dict) and _KEY in manifest.state
        kept = load_state(manifest)[_KEY] if is_ours else {"planner_data": None, "bytes": {}}
        self._bytes = kept["bytes"]
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {fqn: BytesStorageMetadata() for fqn in self._bytes}
        for name, stored in manifest.tensors.items():
            if name.startswith(self._prefix) and not name.startswith(RESERVED_PREFIXES):
                found[name.removeprefix(self._prefix)] = TensorStorageMetadata(
                    properties=TensorProperties(dtype=stored.dtype),
                    size=torch.Size(stored.shape),
                    chunks=_chunks(stored),
                )
        for name, first in manifest.aliases.items():
            if name.startswith(self._prefix):
                found[name.removeprefix(self._prefix)] = found[first.removeprefix(self._prefix)]
        return Metadata(state_dict_metadata=found, planner_data=kept["planner_data"])

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._manifest is None:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._manifest is not None
        targets: list[LocalTensor] = []
        resolved: list[tuple[Any, Tensor]] = []
        for item in plan.items:
            fqn = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self._bytes[fqn]))
                continue
            target = planner.resolve_tensor(item)
            resolved.append((item, target))
            name = self._manifest.aliases.get(self._prefix + fqn, self._prefix + fqn)
            shape = tuple(item.lengths)
            chunk = tuple(item.storage_index.offset or (0,) * len(shape))
            offset = tuple(at + within for at, within in zip(chunk, item.storage_offsets, strict=True))
            piece = Piece(local=(0,) * len(shape), offset=offset, shape=shape)
            targets.append(
                LocalTensor(
                    name=name,
                    tensor=target.detach(),
                    global_shape=self._manifest.tensors[name].shape,
                    pieces=(piece,),
                    owners=(0,),
                )
            )
        load_into(self._manifest, targets, cast=True)
        for item, target in resolved:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


def _chunks(stored: StoredTensor) -> list[ChunkStorageMetadata]:
    pieces = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)) for piece in stored.pieces]
    return pieces or [ChunkStorageMetadata(torch.Size((0,) * len(stored.shape)), torch.Size(stored.shape))]
