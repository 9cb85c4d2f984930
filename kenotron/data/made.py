"""Corpora that are tokenised when they are first used: once for each input, tokenizer and setting, into a cache.

1. A job is named by a digest of all that its tokens depend on; its folder in the cache is that digest.
2. Whoever comes first locks the name; others on the same file system wait, and find it done.
3. Shard by shard is written and published, with a record; a job that was killed goes on with the first shard that has none.
4. ``corpus.json`` says that all are there. From then on the folder is a corpus like any other, and is only read.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kenotron.data.corpus import CORPUS_FILE, TOKENIZER_FOLDER, open_corpus, read_record
from kenotron.data.errors import CorpusFileMissingError
from kenotron.data.masked import MaskedSource, with_mask
from kenotron.data.nanoset import NanosetWriter, token_size_of
from kenotron.data.publish import NewFile, publish, publish_text
from kenotron.data.source import TokenSource
from kenotron.data.tokenize.shards import PROGRESS_FOLDER, BadInputError
from kenotron.data.tokenize.vocabulary import Vocabulary, copy_tokenizer, read_vocabulary

_log = logging.getLogger(__name__)

#: Problems that are noted one by one, and seconds between two lines of progress.
_TOLD, _SECONDS_BETWEEN_LINES = 100, 10.0
#: What of a tokenizer's folder decides what it does.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")


class Made(NamedTuple):
    """A document: its token ids, and which of them are learned (bool, as many; ``None``: all)."""

    ids: Sequence[int] | np.ndarray
    learned: np.ndarray | None = None


class Refused(NamedTuple):
    """What is no document. ``kind``: a few words to count by. ``place``, ``message``: where and what."""

    kind: str
    place: str
    message: str


def default_cache() -> Path:
    """Return the folder for corpora that are made, where the user names none."""
    return Path.home() / ".cache" / "kenotron" / "corpora"


def tokenizer_digest(path: str | Path) -> str:
    """Return what changes when a tokenizer does.

    Args:
        path: a ``tokenizer.json``, or a folder that ``AutoTokenizer`` reads.

    Raises:
        ValueError: there is none.
    """
    place = Path(path).expanduser()
    files = [place / name for name in _TOKENIZER_FILES] if place.is_dir() else [place]
    found = [file for file in files if file.is_file()]
    if not any(file.suffix == ".json" for file in found):
        raise ValueError(f"tokenizer={str(path)!r} is no tokenizer. Name a tokenizer.json, or a folder with one.")
    digest = hashlib.sha256()
    for file in found:
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class MadeCorpus(abc.ABC):
    """A corpus that is made of something else before it is opened.

    Subclasses say what a job depends on, and yield its documents.

    Args:
        tokenizer: a ``tokenizer.json``, or a folder that ``AutoTokenizer`` reads; ``None``: there are token ids already.
        on_error: what becomes of rows that are no document: "fail", or "skip", and they are counted.
        cache_dir: where tokens are kept; ``None``: where the data module says.
    """

    #: Whether some tokens of a document are not learned, and kinds of what is left out that ``on_error`` does not concern.
    has_mask: bool = False
    wanted: frozenset[str] = frozenset()

    def __init__(
        self, tokenizer: str | os.PathLike[str] | None, on_error: str, cache_dir: str | os.PathLike[str] | None
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error={on_error!r}: set it to 'fail' or 'skip'.")
        self.tokenizer, self.on_error = None if tokenizer is None else os.fspath(tokenizer), on_error
        self._cache = None if cache_dir is None else Path(cache_dir).expanduser()

    @abc.abstractmethod
    def job(self) -> dict[str, Any]:
        """Return all that the tokens depend on, as values for JSON; equal in all processes of a run."""

    @abc.abstractmethod
    def num_shards(self) -> int:
        """Return into how many files the corpus is cut."""

    @abc.abstractmethod
    def documents(self, shard: int, folder: Path, vocabulary: Vocabulary | None) -> Iterator[Made | Refused]:
        """Yield the documents of a shard, in order.

        Args:
            shard: its number. folder: of the tokenizer, from which to load it. vocabulary: what is known of that.
        """

    def folder(self, cache: Path | None = None) -> Path:
        """Return where the corpus is, or will be."""
        job = json.dumps({**self.job(), "made": 1}, sort_keys=True)
        kind = type(self).__name__.lower().removesuffix("corpus")
        return (self._cache or cache or default_cache()) / f"{kind}-{hashlib.sha256(job.encode()).hexdigest()[:32]}"

    def make(self, cache: Path | None = None) -> Path:
        """Make the corpus where it is not there yet, and return its folder. Processes that come meanwhile wait.

        Raises:
            BadInputError: a row is no document, and ``on_error`` is "fail".
            OSError: writing failed; what is finished stays, and the next call goes on.
            ValueError: there is not a single document.
        """
        folder = self.folder(cache)
        if _is_complete(folder):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not _is_complete(folder):
                _log.info("tokenising %s into %s", self, folder)
                _Making(self, folder).run()
        return folder

    def open(self, name: str, *, cache: Path | None = None, vocab_size: int | None = None) -> TokenSource:
        """Open the corpus, which has been made.

        Raises:
            CorpusError: its files are damaged, or an id is ``vocab_size`` or more.
            ValueError: it has not been made, or by another process from other data.
        """
        folder = self.folder(cache)
        if not _is_complete(folder):
            raise ValueError(
                f"the corpus {name} is not in {folder}, where this process looks for it. Call make() first. If another rank "
                "has made one, its data differed: build the same data in every process, and cache it on a disk that all see."
            )
        source = with_mask(open_corpus(folder, name=name, vocab_size=vocab_size))
        if self.has_mask and not isinstance(source, MaskedSource):
            raise CorpusFileMissingError(folder / "00000.ds.loss", "is not there: it says what is learned. Remove the folder")
        return source


def _is_complete(folder: Path) -> bool:
    return (folder / CORPUS_FILE).is_file() and bool(read_record(folder).get("complete"))


@dataclass(kw_only=True)
class _Record:
    """What became of a shard."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_learned: int = 0
    max_token_id: int = -1
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)


class _Making:
    """The making of one corpus, by the process that holds its lock."""

    def __init__(self, corpus: MadeCorpus, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self._progress = folder / PROGRESS_FOLDER

    def run(self) -> None:
        self._progress.mkdir(exist_ok=True)
        vocabulary, tokenizer = None, self._folder / TOKENIZER_FOLDER
        if self._corpus.tokenizer is not None:
            if not tokenizer.is_dir():
                copy_tokenizer(self._corpus.tokenizer, tokenizer)
            vocabulary = read_vocabulary(tokenizer)
        records, told = [], time.monotonic()
        for shard in range(self._corpus.num_shards()):
            file = self._progress / f"{shard:05d}.json"
            if not file.is_file():
                self._write(shard, vocabulary)
            records.append(_Record(**json.loads(file.read_bytes())))
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                _log.info("%s: %s of %s shards", self._folder, shard + 1, self._corpus.num_shards())
        self._finish(records, vocabulary)

    def _write(self, shard: int, vocabulary: Vocabulary | None) -> None:
        """Write the file of a shard, its mask first, and then its record: without that, none of it counts."""
        path = self._folder / f"{shard:05d}.ds"
        for suffix in ("", ".index", ".metadata", ".loss"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        for left in self._folder.glob(f".{path.name}*.unfinished"):
            left.unlink()
        record = _Record()
        size = 4 if vocabulary is None else token_size_of(vocabulary.size)
        name = self._corpus.tokenizer or ""
        begun = _mask(Path(f"{path}.loss")) if self._corpus.has_mask else contextlib.nullcontext()
        with NanosetWriter(path, token_size=size, tokenizer=name) as writer, begun as mask:
            for item in self._corpus.documents(shard, self._folder / TOKENIZER_FOLDER, vocabulary):
                if isinstance(item, Refused):
                    self._refuse(item, record)
                    continue
                writer.write(item.ids)
                record.max_token_id = max(record.max_token_id, int(np.max(item.ids, initial=-1)))
                if mask is not None:
                    learned = np.ones(len(item.ids), np.uint8) if item.learned is None else item.learned.astype(np.uint8)
                    mask.write(learned)
                    record.num_learned += int(learned.sum())
            record.num_documents, record.num_tokens = writer.num_documents, writer.num_tokens
            record.num_bytes = writer.num_tokens * size
            if not writer.num_documents:
                writer.abort()
            elif mask is not None:
                publish([mask])
        publish_text(self._progress / f"{shard:05d}.json", json.dumps(record.__dict__))

    def _refuse(self, item: Refused, record: _Record) -> None:
        if self._corpus.on_error == "fail" and item.kind not in self._corpus.wanted:
            told = f"{item.place}: {item.kind}: {item.message}"
            raise BadInputError(f"{told}. Repair it, or skip and count such: on_error='skip'")
        record.skipped[item.kind] = record.skipped.get(item.kind, 0) + 1
        if len(record.problems) < _TOLD:
            record.problems.append(item._asdict())

    def _finish(self, records: Sequence[_Record], vocabulary: Vocabulary | None) -> None:
        skipped: dict[str, int] = {}
        for record in records:
            for kind, count in record.skipped.items():
                skipped[kind] = skipped.get(kind, 0) + count
        counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
        problems = [problem for record in records for problem in record.problems][:_TOLD]
        if not any(record.num_documents for record in records):
            first = f" The first: {problems[0]['place']}: {problems[0]['message']}." if problems else ""
            raise ValueError(f"No document came of {self._corpus}: {counted or 'it is empty'}.{first}")
        found = {
            "version": 1,
            "complete": True,
            "tokenizer": self._corpus.tokenizer or "",
            "job": self._corpus.job(),
            "num_documents": sum(record.num_documents for record in records),
            "num_tokens": sum(record.num_tokens for record in records),
            "num_learned": sum(record.num_learned for record in records) if self._corpus.has_mask else None,
            "max_token_id": max(record.max_token_id for record in records),
            "vocab_size": None if vocabulary is None else vocabulary.size,
            "bos_token_id": None if vocabulary is None else vocabulary.bos_id,
            "eos_token_id": None if vocabulary is None else vocabulary.eos_id,
            "skipped": dict(sorted(skipped.items())),
            "problems": problems,
            "files": [
                {
                    "name": f"{number:05d}.ds",
                    "bytes": record.num_bytes,
                    "num_tokens": record.num_tokens,
                    "num_documents": record.num_documents,
                }
                for number, record in enumerate(records)
                if record.num_documents
            ],
        }
        publish_text(self._folder / CORPUS_FILE, json.dumps(found, indent=1))
        for file in self._progress.iterdir():
            file.unlink()
        self._progress.rmdir()
        documents, tokens = f"{found['num_documents']:,} documents", f"{found['num_tokens']:,} tokens"
        told = f", {found['num_learned']:,} of them learned" if self._corpus.has_mask else ""
        _log.info("%s: %s, %s%s%s", self._folder, documents, tokens, told, f"; {counted}" if counted else "")


@contextlib.contextmanager
def _mask(path: Path) -> Iterator[NewFile]:
    """Begin a file that is thrown away unless it is published."""
    file = NewFile(path)
    try:
        yield file
    finally:
        file.remove()


def in_batches(rows: Iterable[Any], size_of: Any, limit: int) -> Iterator[list[Any]]:
    """Yield lists of rows whose sizes sum to about ``limit``; one of any size is in one."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += size_of(row)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
