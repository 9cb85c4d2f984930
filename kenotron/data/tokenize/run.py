"""``tokenize``: the job from its first to its last step."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kenotron.data.corpus import TOKENIZER_FOLDER
from kenotron.data.tokenize import job as jobs
from kenotron.data.tokenize.inputs import InputFile, Piece, cut, digest_of, find_inputs, shard_bytes_of
from kenotron.data.tokenize.shards import Settings, ShardRecord
from kenotron.data.tokenize.vocabulary import END_OF_TEXT, SMALLEST_VOCABULARY, Vocabulary, copy_tokenizer, read_vocabulary
from kenotron.data.tokenize.workers import Task, WorkerError, run_tasks, shard_task, train_task

#: A tokenizer is trained on so many bytes at most, taken evenly from all of the input; more change a vocabulary little.
TRAINING_BYTES = 1 << 30


class TokenizeError(RuntimeError):
    """A job stopped before its end. What is finished stays; the same command goes on where it stopped."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job has come.

    Attributes:
        step: "train" or "tokenize". documents, tokens: done. num_bytes: of the input that have been read. total_bytes: of all
            of it. seconds: since the step began in this run. resumed_bytes: of those read, what earlier runs have read.
            resumed_documents, resumed_tokens: likewise.
    """

    step: str
    documents: int
    tokens: int
    num_bytes: int
    total_bytes: int
    seconds: float
    resumed_bytes: int = 0
    resumed_documents: int = 0
    resumed_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizeReport:
    """What came of a job.

    Attributes:
        out: the folder. num_documents, num_tokens: written, by this run and those before. num_files: of input. num_bytes: of
            input. skipped: how many were no documents, by kind. problems: the first hundred of these. num_shards: files of
            tokens. resumed_shards: of which earlier runs had finished so many. seconds: this run took.
    """

    out: Path
    num_documents: int
    num_tokens: int
    num_files: int
    num_bytes: int
    skipped: dict[str, int]
    problems: tuple[jobs.InputProblem, ...]
    num_shards: int
    resumed_shards: int
    seconds: float


def tokenize(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    workers: int | None = None,
    format: str = "nanoset",
    column: str = "text",
    append_eos: bool = False,
    prepend_bos: bool = False,
    eos_token: str | None = None,
    on_error: str = "fail",
    shard_bytes: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TokenizeReport:
    """Tokenise text into a folder that ``open_corpus`` reads.

    What is written depends on nothing but the inputs, the tokenizer and the options: not on ``workers``, and not on how often
    the run was killed. Called again after a kill, it goes on.

    Args:
        inputs: files, folders, globs; paths or URLs of fsspec. By the ends of their names JSON lines (.jsonl, .ndjson, .json),
            Parquet (.parquet, .pq), or plain text, one document a file (all others); .gz and .zst are unpacked. What begins
            with a dot in a folder is left out.
        out: the folder; a tokenizer, files of tokens and corpus.json.
        tokenizer: a ``tokenizer.json``, or a folder that ``AutoTokenizer`` reads; nothing is downloaded.
        train_tokenizer: in its place: train a byte-level BPE of this size on the input, 1 GiB of it at most.
        workers: processes; None takes one for each core. A compressed file is tokenised by one of them, on several threads
            where there are fewer files than workers.
        format: "nanoset" or "megatron".
        column: that holds the text, in JSON lines and Parquet.
        append_eos, prepend_bos: put the tokenizer's token for it at the end, at the begin, of each document. No other special
            tokens are added.
        eos_token: the one to append, where the tokenizer names none or another.
        on_error: what becomes of invalid UTF-8, broken JSON, missing columns, values that are no text and empty documents:
            "fail" or "skip".
        shard_bytes: of input in a file of tokens; None takes 1/256 of the input, at least 4 MiB and at most 1 GiB.
        on_progress: called a few times a second.

    Raises:
        BadInputError: something is no document, and ``on_error`` is "fail".
        TokenizeError: reading or writing failed (a full disk, say), or a worker was killed; call it again to go on.
        ValueError: an option is wrong, or ``out`` holds the outcome of another job.
    """
    started = time.monotonic()
    _check_tokenizer(tokenizer, train_tokenizer, append_eos, prepend_bos, eos_token)
    _check(workers, format, on_error, shard_bytes)
    folder = Path(out).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out} is a file. Name a folder to make.")
    files = find_inputs(inputs, folder)
    num_workers = workers or len(os.sched_getaffinity(0))
    size = shard_bytes or shard_bytes_of(files)
    pieces = cut(files, size)
    shards = {f"{number:0{max(5, len(str(len(pieces) - 1)))}d}": shard for number, shard in enumerate(pieces)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with jobs.locked(folder):
            job: dict[str, Any] = {
                "inputs": {"files": len(files), "bytes": sum(file.size for file in files), "digest": digest_of(files)},
                "shard_bytes": size,
                "format": format,
                "column": column,
                "append_eos": append_eos,
                "prepend_bos": prepend_bos,
                "eos_token": eos_token,
            }
            if tokenizer is not None:
                record, vocabulary = _begin_with(tokenizer, folder, job)
            else:
                record = jobs.begin(folder, job | {"tokenizer": f"trained, {train_tokenizer} tokens"}, TOKENIZER_FOLDER)
                vocabulary = _train(folder, train_tokenizer, pieces, column, num_workers, on_progress)
            prefix, suffix = _around(vocabulary, prepend_bos, append_eos)
            settings = Settings(
                out=folder,
                tokenizer=folder / TOKENIZER_FOLDER,
                tokenizer_name=record["tokenizer"],
                vocab_size=vocabulary.size,
                prefix=prefix,
                suffix=suffix,
                format=format,
                column=column,
                skip=on_error == "skip",
            )
            if record["complete"] and all((folder / file["name"]).is_file() for file in record["files"]):
                return _report(record, folder, files, len(record["files"]), started)
            finished = jobs.finished_shards(shards, settings)
            records = finished | _run(shards, finished, settings, num_workers, on_progress)
            record = jobs.finish(record, settings, vocabulary, shards, records)
    except (OSError, WorkerError) as error:
        raise TokenizeError(
            f"{error}. What is finished stays in {folder}: give the same command again when that is mended, and it goes on."
        ) from error
    return _report(record, folder, files, len(finished), started)


def _check_tokenizer(
    tokenizer: str | Path | None, train: int | None, append_eos: bool, prepend_bos: bool, eos_token: str | None
) -> None:
    if (tokenizer is None) == (train is None):
        raise ValueError("Set either tokenizer, to one that exists, or train_tokenizer, to the size of a new one's vocabulary.")
    if train is not None and train < SMALLEST_VOCABULARY:
        raise ValueError(f"train_tokenizer={train}: 256 bytes and {END_OF_TEXT} are {SMALLEST_VOCABULARY} tokens at least.")
    if train is not None and (prepend_bos or eos_token is not None):
        raise ValueError(f"A tokenizer that is trained here has {END_OF_TEXT} alone. Leave prepend_bos and eos_token out.")
    if eos_token is not None and not append_eos:
        raise ValueError(f"eos_token={eos_token!r} is used with append_eos=True alone. Set that, or leave eos_token out.")


def _check(workers: int | None, format: str, on_error: str, shard_bytes: int | None) -> None:
    if format not in ("nanoset", "megatron"):
        raise ValueError(f"format={format!r}: set it to 'nanoset' or 'megatron'.")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error={on_error!r}: set it to 'fail' or 'skip'.")
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: set it to 1 or more.")


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def _begin_with(tokenizer: str | Path, folder: Path, job: dict[str, Any]) -> tuple[dict[str, Any], Vocabulary]:
    """Begin a job with a tokenizer that exists."""
    # Beside its place, so that one which won't do leaves no job behind.
    given, place = folder / ".given", folder / TOKENIZER_FOLDER
    shutil.rmtree(given, ignore_errors=True)
    try:
        copy_tokenizer(tokenizer, given)
        vocabulary = read_vocabulary(given, eos_token=job["eos_token"])
        _around(vocabulary, job["prepend_bos"], job["append_eos"])
        record = jobs.begin(folder, job | {"tokenizer": vocabulary.digest}, str(tokenizer))
        if not place.is_dir():
            os.rename(given, place)
    finally:
        shutil.rmtree(given, ignore_errors=True)
    return record, vocabulary


def _around(vocabulary: Vocabulary, prepend_bos: bool, append_eos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after every document."""
    if append_eos and vocabulary.eos_id is None:
        raise ValueError("The tokenizer names no token that ends a document. Name it: --eos-token TOKEN (eos_token=...)")
    if prepend_bos and vocabulary.bos_id is None:
        raise ValueError("The tokenizer names no token that begins a document. Leave prepend_bos out.")
    prefix = (vocabulary.bos_id,) if prepend_bos and vocabulary.bos_id is not None else ()
    suffix = (vocabulary.eos_id,) if append_eos and vocabulary.eos_id is not None else ()
    return prefix, suffix


def _train(
    folder: Path, size: int | None, shards: list[list[Piece]], column: str, num_workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> Vocabulary:  # fmt: skip
    """Train a tokenizer where an earlier run has not, in a process of its own, on as many threads as there are workers."""
    assert size is not None
    place = folder / TOKENIZER_FOLDER
    if not place.is_dir():
        total = sum(piece.stop - piece.start for shard in shards for piece in shard)
        # Every n-th shard: the begin of a corpus is not like its end.
        pieces = [piece for shard in shards[:: max(1, total // TRAINING_BYTES)] for piece in shard]
        total = sum(piece.stop - piece.start for piece in pieces)
        meter = _Meter("train", total, on_progress)
        for _, kind, what in run_tasks([(train_task, (pieces, column, size, place, TRAINING_BYTES))], 1, num_workers):
            if kind == "told":
                meter.add(*what)
        meter.end()
    return read_vocabulary(place)


# ---- Shards ---------------------------------------------------------------------------------------------------------


def _run(
    shards: dict[str, list[Piece]], finished: dict[str, ShardRecord], settings: Settings, num_workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, ShardRecord]:  # fmt: skip
    """Tokenise the shards that are not finished, and return their records."""
    sizes = {shard: sum(piece.stop - piece.start for piece in pieces) for shard, pieces in shards.items()}
    missing = [shard for shard in shards if shard not in finished]
    meter = _Meter("tokenize", sum(sizes.values()), on_progress)
    for shard, record in finished.items():
        meter.resume(record.num_documents, record.num_tokens, sizes[shard])
    # Where there are fewer shards than workers, a shard gets several threads.
    num_processes = min(num_workers, len(missing))
    num_threads = max(1, num_workers // max(1, num_processes))
    tasks: list[Task] = [(shard_task, (shard, shards[shard], settings, num_threads)) for shard in missing]
    records = {}
    for number, kind, what in run_tasks(tasks, num_processes, num_threads):
        if kind == "told":
            meter.add(*what)
        else:
            records[missing[number]] = what
    meter.end()
    return records


class _Meter:
    """Adds up what workers tell, and tells it a few times a second."""

    def __init__(self, step: str, total_bytes: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._begun, self._told, self._on_progress = time.monotonic(), 0.0, on_progress
        self._now = Progress(step=step, documents=0, tokens=0, num_bytes=0, total_bytes=total_bytes, seconds=0.0)

    def resume(self, documents: int, tokens: int, num_bytes: int) -> None:
        """Count what earlier runs have done."""
        now = self._now
        self._now = replace(
            now,
            resumed_documents=now.resumed_documents + documents,
            resumed_tokens=now.resumed_tokens + tokens,
            resumed_bytes=now.resumed_bytes + num_bytes,
            documents=now.documents + documents,
            tokens=now.tokens + tokens,
            num_bytes=now.num_bytes + num_bytes,
        )

    def add(self, documents: int, tokens: int, num_bytes: int) -> None:
        """Count what has been done since."""
        now, seconds = self._now, time.monotonic() - self._begun
        self._now = replace(
            now,
            documents=now.documents + documents,
            tokens=now.tokens + tokens,
            num_bytes=now.num_bytes + num_bytes,
            seconds=seconds,
        )
        if seconds - self._told > 0.2:
            self.end()

    def end(self) -> None:
        """Tell how it stands."""
        self._told = self._now.seconds
        if self._on_progress is not None:
            self._on_progress(self._now)


def _report(record: dict[str, Any], out: Path, files: list[InputFile], resumed: int, started: float) -> TokenizeReport:
    return TokenizeReport(
        out=out,
        num_documents=record["num_documents"],
        num_tokens=record["num_tokens"],
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        skipped=record["skipped"],
        problems=tuple(jobs.InputProblem(**problem) for problem in record["problems"]),
        num_shards=len(record["files"]),
        resumed_shards=resumed,
        seconds=time.monotonic() - started,
    )
