"""What can be wrong with a tokenised corpus: one class for each violation, all of them ``CorpusError``."""

from __future__ import annotations

from pathlib import Path


class CorpusError(RuntimeError):
    """Base of everything that can be wrong with the files of a corpus.

    Attributes:
        path: the file. offset: of the byte in it from which on it is wrong, None where the file as a whole is.
    """

    def __init__(self, path: str | Path, problem: str, offset: int | None = None) -> None:
        place = f"{path}" if offset is None else f"{path}, byte {offset}"
        super().__init__(f"{place}: {problem}")
        self.path, self.problem, self.offset = Path(path), problem, offset

    def __reduce__(self) -> tuple[type[CorpusError], tuple[Path, str, int | None]]:
        return type(self), (self.path, self.problem, self.offset)  # they cross from data workers to the trainer


class CorpusFileMissingError(CorpusError):
    """A file that belongs to another one is not there."""


class CorpusSizeError(CorpusError):
    """A file has more or fewer bytes than the others say, or than it had when it was opened."""


class CorpusHeaderError(CorpusError):
    """The header of an index is not one, is of a later version, or names a type that holds no token ids."""


class CorpusIndexError(CorpusError):
    """Where documents end is not in order, or past the end of the tokens."""


class CorpusMetadataError(CorpusError):
    """The metadata beside the tokens contradicts itself, or can't be read."""


class CorpusVocabularyError(CorpusError):
    """A token id is negative or beyond the vocabulary."""


class CorpusUnfinishedError(CorpusError):
    """The files are those of a tokenisation that has not come to its end."""


class EmptyCorpusError(CorpusError):
    """There is not a single token, or not a single file of tokens."""
