"""What a folder of tokens says of itself: which job made it, and how far that has come."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kenotron.data.corpus import CORPUS_FILE, read_record
from kenotron.data.publish import UNFINISHED, publish_text
from kenotron.data.tokenize.inputs import InputFile, Piece
from kenotron.data.tokenize.shards import PROGRESS_FOLDER, Settings, ShardRecord
from kenotron.data.tokenize.shards import read_record as read_shard
from kenotron.data.tokenize.vocabulary import Vocabulary

_TOLD = 100


@dataclass(frozen=True, kw_only=True)
class InputProblem:
    """Something in the input that is no document.

    Attributes:
        file: path or URL. kind: as ``documents.Problem`` has it. line: of the file, from 1 (a row in Parquet), None where it
            concerns the file. offset: of the byte, None where that means nothing. message: what was found.
    """

    file: str
    kind: str
    line: int | None
    offset: int | None
    message: str


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from working in a folder; ``ValueError`` where one does. The lock ends with the process."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is tokenising into {out}. Wait for it, or choose another folder.") from None
        yield


def begin(out: Path, job: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """Note a job in its folder, or find that it is the one that was begun there.

    Args:
        out: the folder. job: all that what is written depends on. tokenizer: its name; it may have another one next time.

    Returns:
        What the folder says of itself.

    Raises:
        ValueError: the folder holds something else, or the outcome of another job.
    """
    if (out / CORPUS_FILE).is_file():
        record = read_record(out)
        _refuse_other(out, record.get("job", {}), job)
        _sweep(out)
        return record
    others = sorted(name for name in os.listdir(out) if not name.startswith("."))
    if others:
        raise ValueError(f"{out} holds {others[0]}, and no tokenisation. Choose an empty folder, or one that is not there.")
    _sweep(out)
    record = {"version": 1, "complete": False, "tokenizer": tokenizer, "job": job}
    write_record(out, record)
    return record


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write what the folder says of itself, in one step."""
    publish_text(out / CORPUS_FILE, json.dumps(record, indent=1))


def _refuse_other(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to mix two jobs in one folder, with the reason."""
    if before.get("inputs") != now["inputs"]:
        old, new = before.get("inputs", {}), now["inputs"]
        what = f"{old.get('files')} files of {old.get('bytes')} bytes"
        same = (old.get("files"), old.get("bytes")) == (new["files"], new["bytes"])
        now_are = "have changed, or are others of the same size" if same else f"are {new['files']} of {new['bytes']} bytes now"
        raise ValueError(f"{out} was begun with other inputs: {what}; they {now_are}. Choose another folder.")
    if before.get("tokenizer") != now["tokenizer"]:
        old, new = before.get("tokenizer"), now["tokenizer"]
        raise ValueError(f"{out} was begun with another tokenizer ({old}) than this one ({new}). Choose another folder.")
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{out} was begun with {key} = {before.get(key)!r}, and now it is {value!r}. Choose another folder, or set it "
                "as it was."
            )


def _sweep(out: Path) -> None:
    """Remove what a process that was killed has left half-written."""
    for entry in out.iterdir():
        if entry.name.startswith(".") and entry.name.endswith(UNFINISHED):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def finished_shards(shards: dict[str, list[Piece]], settings: Settings) -> dict[str, ShardRecord]:
    """Return the records of those shards that are finished and whose files are still there."""
    (settings.out / PROGRESS_FOLDER).mkdir(exist_ok=True)
    finished = {}
    for shard in shards:
        file = settings.record_file(shard)
        if not file.is_file():
            continue
        record = read_shard(file)
        if not record.num_documents or all(part.is_file() for part in settings.files_of(shard)):
            finished[shard] = record
    return finished


def finish(
    record: dict[str, Any], settings: Settings, vocabulary: Vocabulary, shards: dict[str, list[Piece]],
    records: dict[str, ShardRecord],
) -> dict[str, Any]:  # fmt: skip
    """Note that all shards are finished, and return what the folder now says of itself."""
    ordered = [records[shard] for shard in shards]
    written = [(shard, records[shard]) for shard in shards if records[shard].num_documents]
    counts: dict[str, int] = {}
    for one in ordered:
        for kind, count in one.counts.items():
            counts[kind] = counts.get(kind, 0) + count
    complete = record | {
        "complete": True,
        "num_documents": sum(one.num_documents for one in ordered),
        "num_tokens": sum(one.num_tokens for one in ordered),
        "max_token_id": max((one.max_token_id for one in ordered), default=-1),
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "documents_end_with_eos": bool(settings.suffix),
        "skipped": dict(sorted(counts.items())),
        "problems": [asdict(problem) for problem in _problems(shards, records)],
        "files": [
            {
                "name": settings.data_file(shard).name,
                "bytes": one.num_bytes,
                "num_tokens": one.num_tokens,
                "num_documents": one.num_documents,
            }
            for shard, one in written
        ],
    }
    write_record(settings.out, complete)
    shutil.rmtree(settings.out / PROGRESS_FOLDER, ignore_errors=True)
    return complete


def _problems(shards: dict[str, list[Piece]], records: dict[str, ShardRecord]) -> list[InputProblem]:
    """Return the first problems, with lines counted from the begin of each file."""
    found: list[InputProblem] = []
    file: InputFile | None = None
    before = 0  # lines of the file in the pieces so far
    for shard, pieces in shards.items():
        record = records[shard]
        starts = []
        for piece, lines in zip(pieces, record.lines, strict=True):
            if piece.file is not file:
                file, before = piece.file, 0
            starts.append(before)
            before += lines
        for number, kind, line, offset, message in record.problems:
            at = None if line is None else line + starts[number]
            found.append(InputProblem(file=pieces[number].file.name, kind=kind, line=at, offset=offset, message=message))
    return found[:_TOLD]
