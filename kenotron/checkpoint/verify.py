"""Check a checkpoint without loading it: every byte of its files, and everything that is wrong, not only the first.

1. The manifest has its checksum and does not contradict itself (``manifest.py``).
2. Each file is there with its size.
3. A shard's data has the checksums of its chunks. Its header, which has none, is a valid one that the plain safetensors
   library opens, and says of each entry what the manifest says.
4. A pickle has its checksum. None is loaded.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kenotron.callbacks_native import ReadError, crc32c, read_pieces
from kenotron.checkpoint.errors import CheckpointError, ManifestDamagedError
from kenotron.checkpoint.format import CHUNK_BYTES, DTYPE_NAMES, MANIFEST, MAX_HEADER_BYTES, entry_key
from kenotron.checkpoint.load import piece_to_read
from kenotron.checkpoint.manifest import Manifest, StoredPiece, StoredTensor, check_file_size, read_manifest
from kenotron.checkpoint.values import StoredPickle, pickles_in
from kenotron.files import open_regular

_SHARD_SUFFIX = ".safetensors"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Args:
        file: the name of the file that it is in.
        problem: what it is.
        tensor: the global tensor that it is in, where it is in one.
        begin: the first byte in the file. end: the byte after the last. None where it is about no range of bytes.
    """

    file: str
    problem: str
    tensor: str | None = None
    begin: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        where = "" if self.begin is None else f", bytes {self.begin} to {self.end}"
        whose = "" if self.tensor is None else f", tensor {self.tensor}"
        return f"{self.file}{whose}{where}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What was found in one file.

    Args:
        name: its name in the checkpoint's directory.
        num_bytes: how many bytes of it were read.
        seconds: how long that took.
        damages: what is wrong with it.
    """

    name: str
    num_bytes: int
    seconds: float
    damages: tuple[Damage, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found in a checkpoint.

    Args:
        path: the checkpoint's directory.
        files: all of its files, the manifest first.
    """

    path: Path
    files: tuple[FileReport, ...]

    @property
    def damages(self) -> tuple[Damage, ...]:
        """Everything that is wrong, file by file."""
        return tuple(damage for file in self.files for damage in file.damages)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages


def verify(path: str | os.PathLike[str], *, on_file: Callable[[FileReport], None] | None = None) -> VerifyReport:
    """Read all of a published checkpoint, at the speed of the disk, and tell everything that is wrong with it.

    Args:
        path: the checkpoint's directory, or a link to it.
        on_file: is called with the report of each file as soon as it was read.

    Raises:
        NotACheckpointError, NotPublishedError: there is no published checkpoint.
        VersionTooNewError: it was written in a later version of the format.
    """
    reports: list[FileReport] = []
    for report in _reports(Path(path)):
        reports.append(report)
        if on_file is not None:
            on_file(report)
    return VerifyReport(path=Path(path), files=tuple(reports))


def _reports(path: Path) -> Iterator[FileReport]:
    start = time.perf_counter()
    try:
        manifest = read_manifest(path, check_files=False)
        pickles = {pickle.file: pickle for state in (manifest.state, *manifest.rank_states) for pickle in pickles_in(state)}
    except ManifestDamagedError as error:
        # Nothing is known of the rest.
        yield FileReport(name=MANIFEST, num_bytes=0, seconds=0.0, damages=(Damage(file=MANIFEST, problem=str(error)),))
        return
    yield FileReport(
        name=MANIFEST,
        num_bytes=(path / MANIFEST).stat().st_size,
        seconds=time.perf_counter() - start,
        damages=tuple(
            Damage(file=MANIFEST, problem=f"{file}, which holds a {pickle.type}, is not listed")
            for file, pickle in pickles.items()
            if file not in manifest.files
        ),
    )
    stored: defaultdict[str, list[_Entry]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            stored[piece.file].append(_Entry(name, tensor, piece))
    for file in manifest.files:
        if file in stored or file.endswith(_SHARD_SUFFIX):
            yield _verify_shard(manifest, file, sorted(stored[file], key=lambda entry: entry.piece.begin))
        else:
            yield _verify_other(manifest, file, pickles.get(file))


@dataclass(frozen=True)
class _Entry:
    """A piece of a shard and whose it is."""

    name: str
    tensor: StoredTensor
    piece: StoredPiece


def _verify_shard(manifest: Manifest, file: str, entries: list[_Entry]) -> FileReport:
    path = manifest.path / file
    problems = _problems_with_size(manifest, file)
    if not path.is_file():
        return FileReport(name=file, num_bytes=0, seconds=0.0, damages=tuple(problems))
    told = [
        *_problems_with_header(path, manifest, entries),
        *([] if problems else _problems_with_opening(path)),
    ]
    problems += [Damage(file=file, problem=problem) for problem in told]
    pieces = [piece_to_read(entry.piece, entry.tensor.dtype.itemsize, 0) for entry in entries]
    result = read_pieces([path], pieces, chunk_bytes=CHUNK_BYTES, stop_at_first_error=False)
    problems += _join(_damage_of(error, file, entries[error.piece].name) for error in result.errors)
    return FileReport(name=file, num_bytes=result.num_bytes, seconds=result.seconds, damages=tuple(problems))


def _verify_other(manifest: Manifest, file: str, pickle: StoredPickle | None) -> FileReport:
    """Check a file that is no shard: a pickle, or one that the manifest only lists."""
    start = time.perf_counter()
    problems = _problems_with_size(manifest, file)
    num_bytes = 0
    if not problems and pickle is not None:
        try:
            checksum = 0
            with open_regular(manifest.path / file) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    checksum = crc32c(block, checksum)
                    num_bytes += len(block)
            if checksum != pickle.crc32c:
                problem = f"this pickle of a {pickle.type} does not have its checksum"
                problems.append(Damage(file=file, problem=problem, begin=0, end=num_bytes))
        except OSError as error:
            problems.append(Damage(file=file, problem=f"cannot be read: {error.strerror}"))
    return FileReport(name=file, num_bytes=num_bytes, seconds=time.perf_counter() - start, damages=tuple(problems))


def _problems_with_size(manifest: Manifest, file: str) -> list[Damage]:
    try:
        check_file_size(manifest.path / file, manifest.files[file])
    except (CheckpointError, OSError) as error:
        return [Damage(file=file, problem=str(error))]
    return []


def _problems_with_header(path: Path, manifest: Manifest, entries: Iterable[_Entry]) -> Iterator[str]:
    """Yield where a shard's header is none, or tells another story than the manifest."""
    try:
        header, data_begin = _read_header(path)
    except (OSError, RecursionError, ValueError) as error:
        yield f"its header cannot be read: {error}"
        return
    save_id, metadata = manifest.origins.get(path.name, manifest.save_id), header.pop("__metadata__", None)
    if metadata != {"format": "pt", "save_id": save_id}:
        yield f"its header has the metadata {metadata!r:.200} and should have those of the save {save_id!r}"
    for entry in entries:
        key = entry_key(entry.name, entry.tensor.shape, entry.piece.box)
        wanted = {
            "dtype": DTYPE_NAMES[entry.tensor.dtype],
            "shape": list(entry.piece.shape),
            "data_offsets": [entry.piece.begin - data_begin, entry.piece.end - data_begin],
        }
        found = header.pop(key, None)
        if found != wanted:
            yield f"its header says of {key}: {found!r:.200}, and the manifest {wanted!r}"
    if header and not manifest.is_merged:
        yield f"its header has entries that the manifest does not know: {', '.join(header):.200}"


def _problems_with_opening(path: Path) -> Iterator[str]:
    """Yield why the plain safetensors library does not open a shard, if it does not. It parses the header, no more."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        yield f"the safetensors library does not open it: {error}"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors header and where the data begins; ``ValueError`` where it is none."""
    with open_regular(path) as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"it would take {num_bytes} bytes")
        header = json.loads(stream.read(num_bytes))
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    return header, 8 + num_bytes


def _damage_of(error: ReadError, file: str, tensor: str) -> Damage:
    if error.kind == "io":
        problem = f"cannot be read: {os.strerror(error.code)}"
    elif error.kind == "cut":
        problem = "the file has ended before"
    else:
        problem = "the data does not have its checksum"
    return Damage(file=file, problem=problem, tensor=tensor, begin=error.offset, end=error.offset + error.length)


def _join(damages: Iterable[Damage]) -> list[Damage]:
    """Make one damage of chunks that follow one another in a tensor and have the same problem."""
    joined: list[Damage] = []
    for damage in damages:
        last = joined[-1] if joined else None
        if last and (last.tensor, last.problem, last.end) == (damage.tensor, damage.problem, damage.begin):
            joined[-1] = replace(last, end=damage.end)
        else:
            joined.append(damage)
    return joined
