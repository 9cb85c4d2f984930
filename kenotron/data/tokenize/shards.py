"""What a worker does: the documents of a shard become one file of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kenotron.data.megatron import MegatronWriter
from kenotron.data.nanoset import NanosetWriter
from kenotron.data.publish import publish_text
from kenotron.data.tokenize.documents import Document, PieceReader, Problem, lines_before
from kenotron.data.tokenize.inputs import Piece
from kenotron.data.tokenize.vocabulary import Encoder, flat
from kenotron.files import read_regular

#: Of text that is encoded at once, for each thread.
_BATCH_BYTES = 1 << 20
#: Problems of a shard that are told one by one; the others are only counted.
_TOLD = 20

#: The folder in which finished shards are noted while others are not.
PROGRESS_FOLDER = ".progress"


class BadInputError(ValueError):
    """An input holds something that is no document, and is not to be skipped."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all shards of a job have in common.

    Attributes:
        out: the folder. tokenizer_name: for the metadata of Nanoset. vocab_size: one more than the largest id. prefix, suffix:
            ids around every document. format: "nanoset" or "megatron". column: that holds the text. skip: what is no document
            is counted, and else an error.
    """

    out: Path
    tokenizer: Path
    tokenizer_name: str
    vocab_size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    format: str
    column: str
    skip: bool

    @property
    def dtype(self) -> np.dtype:
        """The tokens' type in files: what datatrove and Megatron choose for a vocabulary."""
        wide = "<u4" if self.format == "nanoset" else "<i4"
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else wide)

    def data_file(self, shard: str) -> Path:
        """Return the file of a shard's tokens."""
        return self.out / f"{shard}{'.ds' if self.format == 'nanoset' else '.bin'}"

    def files_of(self, shard: str) -> list[Path]:
        """Return all files of a shard, the last one first that is published."""
        data = self.data_file(shard)
        if self.format == "megatron":
            return [data, data.with_suffix(".idx")]
        return [data, Path(f"{data}.index"), Path(f"{data}.metadata")]

    def record_file(self, shard: str) -> Path:
        """Return the file that says that a shard is finished."""
        return self.out / PROGRESS_FOLDER / f"{shard}.json"

    def writer(self, shard: str) -> NanosetWriter | MegatronWriter:
        """Begin the file of a shard."""
        if self.format == "megatron":
            return MegatronWriter(self.data_file(shard), dtype=self.dtype)
        return NanosetWriter(self.data_file(shard), token_size=self.dtype.itemsize, tokenizer=self.tokenizer_name)


@dataclass(kw_only=True)
class ShardRecord:
    """What became of a shard.

    Attributes:
        num_documents, num_tokens: written. num_bytes: of its file. max_token_id: -1 where there is none. lines: how many began
            in each of its pieces. counts: of problems, by kind. problems: the first ones: number of the piece, kind, line,
            offset, message.
    """

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    max_token_id: int = -1
    lines: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[int, str, int | None, int | None, str]] = field(default_factory=list)

    def note(self, piece: int, problem: Problem) -> None:
        """Count a problem."""
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        if len(self.problems) < _TOLD:
            self.problems.append((piece, problem.kind, problem.line, problem.offset, problem.message))


def read_record(path: Path) -> ShardRecord:
    """Return what was noted of a finished shard."""
    return ShardRecord(**json.loads(read_regular(path)))


#: Called with documents, tokens and bytes of input that have come on top.
Tell = Callable[[int, int, int], None]


def tokenize_shard(
    shard: str, pieces: list[Piece], settings: Settings, encoder: Encoder, num_threads: int, tell: Tell
) -> ShardRecord:
    """Write the file of a shard, and note that it is finished.

    1. Remove what a run that was killed has left under the shard's names; without a record none of it counts.
    2. Encode; a thread reads ahead meanwhile.
    3. Publish the tokens, then the record. A kill between the two begins at 1 again: nothing is written twice.

    Args:
        shard: its name. num_threads: on which ``tokenizers`` encodes.

    Raises:
        BadInputError: something is no document, and is not to be skipped.
        OSError: reading or writing fails.
    """
    for file in settings.files_of(shard):
        file.unlink(missing_ok=True)
    record = ShardRecord()
    batches = _batches(pieces, settings.column, num_threads * _BATCH_BYTES, record.lines)
    with settings.writer(shard) as writer, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = ahead.submit(next, batches, None)
            documents = _encode(batch, encoder)
            for number, problem in batch.problems:
                _refuse_or_note(problem, number, pieces[number], settings, record)
            ids, lengths = flat(documents, settings.dtype)
            writer.write_documents(ids, lengths)
            record.max_token_id = max(record.max_token_id, int(ids.max()) if len(ids) else -1)
            tell(len(documents), len(ids), batch.num_bytes)
        record.num_documents, record.num_tokens = writer.num_documents, writer.num_tokens
        record.num_bytes = writer.num_tokens * settings.dtype.itemsize
        if not writer.num_documents:
            writer.abort()
    publish_text(settings.record_file(shard), json.dumps(asdict(record)))
    return record


@dataclass
class _Batch:
    """Documents and problems, each with the number of its piece, and how many bytes of input they were read from."""

    documents: list[tuple[int, Document]] = field(default_factory=list)
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    num_bytes: int = 0


def _batches(pieces: list[Piece], column: str, limit: int, lines: list[int]) -> Iterator[_Batch | None]:
    """Yield what is in a shard in batches of about ``limit`` bytes; a document of any size is in one. Fills ``lines``."""
    batch, size = _Batch(), 0
    for number, piece in enumerate(pieces):
        reader, told = PieceReader(piece, column), 0
        for item in reader:
            if isinstance(item, Problem):
                batch.problems.append((number, item))
                size += len(item.message)
            else:
                batch.documents.append((number, item))
                size += len(item.text)
            if size >= limit:
                batch.num_bytes += reader.position - told
                told = reader.position
                yield batch
                batch, size = _Batch(), 0
        batch.num_bytes += reader.position - told
        lines.append(reader.lines)
    yield batch


def _encode(batch: _Batch, encoder: Encoder) -> list[list[int]]:
    """Return the ids of a batch's documents, without those that have none: these join its problems."""
    try:
        found = encoder.encode([document.text for _, document in batch.documents])
    except Exception:  # tokenizers raises no other class, as for a character without a token: find the document
        found = []
        for number, document in batch.documents:
            try:
                found += encoder.encode([document.text])
            except Exception as error:
                found.append([])
                batch.problems.append((number, _problem("not encodable", document, str(error))))
            else:
                if not found[-1]:
                    batch.problems.append((number, _problem("empty", document, "no token")))
    else:
        without = (place for place, ids in zip(batch.documents, found, strict=True) if not ids)
        batch.problems += [(number, _problem("empty", document, "no token")) for number, document in without]
    return [ids for ids in found if ids]


def _problem(kind: str, document: Document, message: str) -> Problem:
    return Problem(kind, document.line, document.offset if document.offset >= 0 else None, message)


def _refuse_or_note(problem: Problem, number: int, piece: Piece, settings: Settings, record: ShardRecord) -> None:
    if settings.skip:
        record.note(number, problem)
        return
    line = None if problem.line is None else problem.line + lines_before(piece)
    place = place_of(piece.file.name, piece.file.kind, line, problem.offset)
    raise BadInputError(f"{place}: {problem.kind}: {problem.message}. Repair it, or skip and count such: --on-error skip")


def place_of(name: str, kind: str, line: int | None, offset: int | None) -> str:
    """Return where something is, for people."""
    if line is None:
        return name
    word = "row" if kind == "parquet" else "line"
    return f"{name}, {word} {line}" + ("" if offset is None else f" (byte {offset})")
