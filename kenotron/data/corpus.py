"""Corpora on disk: files, folders, globs and lists of them as one source, whatever format the files have."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kenotron.data.errors import (
    CorpusError,
    CorpusFileMissingError,
    CorpusMetadataError,
    CorpusSizeError,
    CorpusUnfinishedError,
    CorpusVocabularyError,
    EmptyCorpusError,
)
from kenotron.data.megatron import MegatronSource
from kenotron.data.nanoset import NanosetSource, check_index
from kenotron.data.source import TokenSource
from kenotron.files import read_regular

#: What ``kenotron tokenize`` writes beside its files: what they are, and whether they are all there.
CORPUS_FILE = "corpus.json"
#: The folder beside them that holds the tokenizer.
TOKENIZER_FOLDER = "tokenizer"
#: Places at which opening looks at ids, and how many at each.
_SAMPLES, _SAMPLE_TOKENS = 64, 1024
_CHECKED_AT_ONCE = 1 << 20


# ---- One source of several ------------------------------------------------------------------------------------------


class JoinedSource:
    """The documents of several sources, one after the other. A ``TokenSource``.

    Args:
        name: short, for logs. parts: at least one.
    """

    def __init__(self, name: str, parts: Sequence[TokenSource]) -> None:
        self.name, self.parts = name, tuple(parts)
        #: how many tokens and documents there are before each part, and in all
        self._tokens = np.cumsum([0] + [part.num_tokens for part in self.parts], dtype=np.int64)
        self._documents = np.cumsum([0] + [part.num_documents for part in self.parts], dtype=np.int64)
        self.num_tokens, self.num_documents = int(self._tokens[-1]), int(self._documents[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``[start, stop)``, an int64 copy of shape (stop - start,)."""
        read = [self.parts[part].read(first, last) for part, first, last in self._split(self._tokens, start, stop)]
        return read[0] if len(read) == 1 else np.concatenate([np.zeros(0, np.int64), *read])

    def ends(self, first: int, last: int) -> np.ndarray:
        """Return where documents ``[first, last)`` end: token positions, exclusive, int64 of shape (last - first,)."""
        found = [
            self.parts[part].ends(start, stop) + self._tokens[part]
            for part, start, stop in self._split(self._documents, first, last)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])

    def document_of(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``; empty documents hold none."""
        part = self._part_of(self._tokens, position)
        return int(self._documents[part]) + self.parts[part].document_of(position - int(self._tokens[part]))

    def _split(self, begins: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (part, start in it, stop in it) of a range over all parts."""
        if not 0 <= start <= stop <= begins[-1]:
            raise IndexError(f"[{start}, {stop}) of {self.name}, which has {begins[-1]}")
        part = self._part_of(begins, start)
        while start < stop:
            here = min(stop, int(begins[part + 1]))
            if here > start:
                yield part, start - int(begins[part]), here - int(begins[part])
            start, part = here, part + 1

    @staticmethod
    def _part_of(begins: np.ndarray, position: int) -> int:
        return int(np.searchsorted(begins, position, side="right")) - 1


# ---- Opening --------------------------------------------------------------------------------------------------------


def open_corpus(
    path: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    token_size: int | None = None,
    vocab_size: int | None = None,
) -> TokenSource:
    """Open tokenised files as one source of tokens.

    Files are mapped into memory, not read: opening costs some system calls for each of them, whatever their size.

    Args:
        path: a ``.ds`` file; a ``.bin`` or ``.idx`` file, or what both names begin with; a folder, all files of which are
            taken, those of folders in it too, sorted by name; a glob; or a list of these, in this order.
        name: for logs and metrics; None takes the path's.
        token_size: bytes of a token, where older ``.ds`` files don't tell.
        vocab_size: of the model. Some ids of each file are looked at, 64 Ki at most; a corpus of ``kenotron tokenize`` knows
            its largest. ``check`` looks at all of them.

    Raises:
        CorpusError: a file is not there, is empty, truncated or damaged, or does not belong to the one beside it.
        CorpusVocabularyError: an id is ``vocab_size`` or more.
        ValueError: the path is remote or names one file twice, or ``token_size`` contradicts a file.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise ValueError("An empty list of paths is no corpus. Name at least one file or folder.")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}: set it to the number of rows of the model's embedding.")
    files: list[Path] = []
    for one in paths:
        files += _files_of(one)
    _refuse_repeated(files)
    sources: list[TokenSource] = [_open_file(file, token_size, vocab_size) for file in files]
    if not sum(source.num_tokens for source in sources):
        raise EmptyCorpusError(paths[0], f"there is no token in {'it' if len(files) == 1 else 'any of its files'}", 0)
    if name is None:
        name = "+".join(Path(one).absolute().name.removesuffix(".ds") for one in paths[:3]) + "+…" * (len(paths) > 3)
    if len(sources) == 1:
        sources[0].name = name
    if vocab_size is not None:
        for source in sources:
            _look_at_ids(source, vocab_size)
    return sources[0] if len(sources) == 1 else JoinedSource(name, sources)


def find_tokenizer(path: str | Path) -> Path | None:
    """Return the folder of the tokenizer that made a corpus of ``kenotron tokenize``, None where there is none.

    Args:
        path: the corpus, a file of it, or a file or folder in it.
    """
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        if (folder / CORPUS_FILE).is_file():
            tokenizer = folder / TOKENIZER_FOLDER
            return tokenizer if tokenizer.is_dir() else None
    return None


def _files_of(path: str | Path) -> list[Path]:
    """Return the files of tokens that a path stands for: ``.ds``, and ``.bin`` for pairs."""
    if "://" in str(path):
        raise ValueError(f"{path}: tokens are mapped into memory, which takes a local file. Copy it to a local disk first.")
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_in(place)
    if place.is_file() or Path(f"{place}.idx").is_file() or Path(f"{place}.bin").is_file():
        return [_data_file(place)]
    if glob.has_magic(str(place)):
        matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
        found = [file for match in matches if match.is_dir() for file in _files_in(match, needed=False)]
        found += [match for match in matches if match.is_file() and match.suffix in (".ds", ".bin")]
        if not found:
            raise CorpusFileMissingError(path, "no .ds or .bin file matches")
        return sorted(found)
    raise CorpusFileMissingError(path, "there is no such file or folder")


def _data_file(path: Path) -> Path:
    if path.suffix == ".ds":
        return path
    if path.name.endswith((".ds.index", ".ds.metadata")):
        return path.with_suffix("")
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix(".bin")
    if path.is_file():
        raise ValueError(f"{path} is no file of tokens. Those end in .ds, or in .bin and .idx.")
    return Path(f"{path}.bin")


def _files_in(folder: Path, *, needed: bool = True) -> list[Path]:
    """Return the files of tokens in a folder and the folders in it, sorted. What begins with a dot is left out."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = {name for name in names if not name.startswith(".")}
        for name in present:
            # The other file of a pair that lost one: what was written or copied halfway must not be left out in silence.
            for suffix, other in ((".ds.index", ".ds"), (".idx", ".bin")):
                data = name.removesuffix(suffix) + other
                if name.endswith(suffix) and data not in present:
                    raise CorpusFileMissingError(Path(parent, data), f"is not there, and {name} is")
        if CORPUS_FILE in present:
            _check_record(Path(parent), present)
        found += [Path(parent, name) for name in present if name.endswith((".ds", ".bin"))]
    if not found and needed:
        raise EmptyCorpusError(folder, "no .ds or .bin file is in it")
    return sorted(found)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``kenotron tokenize`` notes of a corpus.

    Raises:
        CorpusMetadataError: it is not what this version writes.
    """
    path = folder / CORPUS_FILE
    try:
        record = json.loads(read_regular(path))
    except ValueError as error:
        raise CorpusMetadataError(path, f"is no JSON: {error}", getattr(error, "pos", 0)) from None
    if not isinstance(record, dict) or record.get("version") != 1:
        raise CorpusMetadataError(path, "is not of version 1, which this code reads")
    files = record.get("files", [])
    if not isinstance(files, list) or not all(map(_is_listed_file, files)):
        raise CorpusMetadataError(path, "lists files that lack a plain name, a number of bytes or of documents")
    return record


def _is_listed_file(entry: object) -> bool:
    """Tell whether an entry of a record is of a file directly in its folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    numbers = [entry.get("bytes"), entry.get("num_documents", 0)]
    return os.path.basename(entry["name"]) == entry["name"] and all(type(number) is int and number >= 0 for number in numbers)


def _check_record(folder: Path, present: set[str]) -> None:
    """Check that a tokenisation is finished and that none of its files is missing."""
    record = read_record(folder)
    if not record.get("complete"):
        problem = "the tokenisation of this folder has not come to its end. Give its command again: it goes on where it was"
        raise CorpusUnfinishedError(folder / CORPUS_FILE, problem)
    for file in record.get("files", ()):
        if file["name"] not in present:
            raise CorpusFileMissingError(folder / file["name"], f"is not there, and {CORPUS_FILE} lists it")
        size = os.path.getsize(folder / file["name"])
        if size != file["bytes"]:
            problem = f"has {size} bytes, and by {CORPUS_FILE} they are {file['bytes']}"
            raise CorpusSizeError(folder / file["name"], problem, min(size, file["bytes"]))
        if file["name"].endswith(".ds"):
            check_index(folder / file["name"], file["num_documents"], CORPUS_FILE)


def _refuse_repeated(files: list[Path]) -> None:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise ValueError(f"{file} is named twice. Name it once; a blend's weights say how often it is seen.")
        seen.add(real)


def _open_file(file: Path, token_size: int | None, vocab_size: int | None) -> NanosetSource | MegatronSource:
    if file.suffix == ".ds":
        return NanosetSource(file, token_size=token_size, vocab_size=vocab_size)
    source = MegatronSource(file)
    if token_size not in (None, source.tokens.dtype.itemsize):
        raise ValueError(f"token_size={token_size}, and {source.index} says {source.tokens.dtype.itemsize}. Leave it out.")
    return source


def _look_at_ids(source: TokenSource, vocab_size: int) -> None:
    """Look at ids evenly over a file: another tokenizer's are found at once, if not a single id that strayed."""
    assert isinstance(source, (NanosetSource, MegatronSource))
    limits = np.iinfo(source.tokens.dtype)
    if limits.max < vocab_size and limits.min == 0:
        return  # every id that fits is one of the vocabulary
    record = source.path.parent / CORPUS_FILE
    if record.is_file():
        largest = read_record(source.path.parent).get("max_token_id")
        if isinstance(largest, int) and largest >= vocab_size:
            raise CorpusVocabularyError(record, _beyond(largest, vocab_size))
    last = max(source.num_tokens - _SAMPLE_TOKENS, 0)
    for start in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
        _check_ids(source, start, min(start + _SAMPLE_TOKENS, source.num_tokens), vocab_size)


def _check_ids(source: NanosetSource | MegatronSource, start: int, stop: int, vocab_size: int) -> tuple[int, int]:
    """Return the smallest and the largest id of a range; raise ``CorpusVocabularyError`` where one is not of the vocabulary."""
    ids = source.tokens.load(start, stop)
    if not ids.size:
        return 0, 0
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise CorpusVocabularyError(source.path, _beyond(int(ids[at]), vocab_size), (start + at) * source.tokens.dtype.itemsize)
    return low, high


def _beyond(token: int, vocab_size: int) -> str:
    return (
        f"token id {token}, and the vocabulary has {vocab_size}. These tokens are another tokenizer's, or have another width; "
        f"or the model's vocabulary must be larger"
    )


# ---- Checking all of it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What was found in one file.

    Attributes:
        path: of the tokens. num_tokens, num_documents: in it. max_token_id: the largest one, -1 where there is none.
        problems: the first one of the document ends and the first one of the ids, if there are any.
    """

    path: Path
    num_tokens: int
    num_documents: int
    max_token_id: int
    problems: tuple[CorpusError, ...]


def check(
    source: TokenSource, *, vocab_size: int | None = None, on_file: Callable[[FileCheck], None] | None = None
) -> tuple[FileCheck, ...]:
    """Read all of a corpus and tell what is wrong with it: every document's end, and every id.

    Memory stays the same for any size.

    Args:
        source: what ``open_corpus`` has returned. vocab_size: of the model; None looks for negative ids only. on_file: called
            after each file.

    Returns:
        What was found in each file. The corpus is sound if none of them has problems.
    """
    found = []
    for part in source.parts if isinstance(source, JoinedSource) else (source,):
        if not isinstance(part, (NanosetSource, MegatronSource)):
            raise ValueError(f"{part.name} is no source of files: pass what open_corpus returns.")
        problems: list[CorpusError] = []
        try:
            end = 0
            for first in range(0, part.num_documents, _CHECKED_AT_ONCE):
                end = part.check_ends(first, min(first + _CHECKED_AT_ONCE, part.num_documents), end)
        except CorpusError as error:
            problems.append(error)
        largest = -1
        try:
            limit = vocab_size if vocab_size is not None else 1 << 63
            for start in range(0, part.num_tokens, _CHECKED_AT_ONCE):
                _, high = _check_ids(part, start, min(start + _CHECKED_AT_ONCE, part.num_tokens), limit)
                largest = max(largest, high)
        except CorpusError as error:
            problems.append(error)
        found.append(
            FileCheck(
                path=part.path,
                num_tokens=part.num_tokens,
                num_documents=part.num_documents,
                max_token_id=largest,
                problems=tuple(problems),
            )
        )
        if on_file is not None:
            on_file(found[-1])
    return tuple(found)
