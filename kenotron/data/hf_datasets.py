"""Map-style datasets of texts, or of token ids, as corpora: tokenised once, and then read like files of tokens."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kenotron.data.made import Made, MadeCorpus, Refused, in_batches, tokenizer_digest
from kenotron.data.records import Record, records_of
from kenotron.data.tokenize.vocabulary import Encoder, Vocabulary, read_vocabulary

_BATCH_CHARACTERS = 1 << 20


class DatasetCorpus(MadeCorpus):
    """A ``datasets.Dataset``, or any sequence of mappings, with a column of texts or of token ids.

    Args:
        dataset: see :func:`kenotron.data.records.records_of`.
        tokenizer: a ``tokenizer.json``, or a folder that ``AutoTokenizer`` reads; ``None``: the column holds token ids.
        column: ``None``: ``text``, or ``input_ids`` without a tokenizer.
        append_eos, prepend_bos: put the tokenizer's token for it at the end, at the begin, of each text.
        fingerprint: of a dataset that does not tell one.
        on_error, cache_dir: as for :class:`kenotron.data.made.MadeCorpus`.

    Raises:
        ValueError: an option is wrong, or there is no such tokenizer.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: str | os.PathLike[str] | None = None,
        *,
        column: str | None = None,
        append_eos: bool = False,
        prepend_bos: bool = False,
        fingerprint: str | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, on_error, cache_dir)
        if tokenizer is None and (append_eos or prepend_bos):
            raise ValueError("append_eos and prepend_bos take a tokenizer. Set tokenizer=..., or put the ids into the column.")
        self._records = records_of(dataset, fingerprint)
        self._column = column or ("input_ids" if tokenizer is None else "text")
        self._append_eos, self._prepend_bos = append_eos, prepend_bos

    def __repr__(self) -> str:
        return f"column {self._column!r} of {self._records!r}"

    @functools.cached_property
    def _job(self) -> dict[str, Any]:
        return {
            "rows": self._records.digest(),
            "tokenizer": None if self.tokenizer is None else tokenizer_digest(self.tokenizer),
            "column": self._column,
            "append_eos": self._append_eos,
            "prepend_bos": self._prepend_bos,
            "on_error": self.on_error,
        }

    def job(self) -> dict[str, Any]:
        """Return all that the tokens depend on."""
        return self._job

    def num_shards(self) -> int:
        """Return into how many files the corpus is cut."""
        return self._records.num_shards()

    def documents(self, shard: int, folder: Path, vocabulary: Vocabulary | None) -> Iterator[Made | Refused]:
        """Yield the documents of a shard, without those that have no token."""
        encoder = RowEncoder(
            self._column,
            None if vocabulary is None else folder,
            prepend_bos=self._prepend_bos,
            append_eos=self._append_eos,
        )
        for batch in in_batches(self._records.read(shard), self._size_of, _BATCH_CHARACTERS):
            for found in encoder.encode(batch):
                yield found if isinstance(found, Refused) else Made(found)

    def _size_of(self, item: Record | Refused) -> int:
        value = item.row.get(self._column) if isinstance(item, Record) else None
        return len(value) if isinstance(value, (str, list)) else 64


class RowEncoder:
    """Makes token ids of rows. It is pickled as its settings, so that a worker loads the tokenizer anew.

    Args:
        column: of the text, or of the ids.
        tokenizer: a folder with ``tokenizer.json``, and ``tokenizer_config.json`` to name the tokens around texts; ``None``:
            the column holds ids.
        prepend_bos, append_eos: put the tokenizer's token for it at the begin, at the end, of each text.

    Raises:
        ValueError: there is no such tokenizer, or it names no such token.
    """

    def __init__(self, column: str, tokenizer: Path | None, *, prepend_bos: bool = False, append_eos: bool = False) -> None:
        self._column, self._folder = column, tokenizer
        self._prefix, self._suffix = [], []
        self._encoder: Encoder | None = None
        if tokenizer is None:
            return
        if not (tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer={str(tokenizer)!r}: no tokenizer.json is in it. Name a folder with a fast tokenizer.")
        names = read_vocabulary(tokenizer) if (tokenizer / "tokenizer_config.json").is_file() else None
        self._prefix = _named(prepend_bos, None if names is None else names.bos_id, "prepend_bos", "bos_token", tokenizer)
        self._suffix = _named(append_eos, None if names is None else names.eos_id, "append_eos", "eos_token", tokenizer)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_encoder": None}

    def encode(self, items: Sequence[Record | Refused]) -> list[np.ndarray | Refused]:
        """Return the ids of each row, int64 of shape (tokens,), at least one; or what is wrong with it."""
        values = [self._value(item) for item in items]
        texts = [value for value in values if isinstance(value, str)]
        encoded = iter(self._encode(texts))
        return [
            value if isinstance(value, Refused) else _ids(next(encoded) if isinstance(value, str) else value, item.place)
            for item, value in zip(items, values, strict=True)
        ]

    def _value(self, item: Record | Refused) -> Any:
        """Return a text, what should be ids, or what is wrong."""
        if isinstance(item, Refused):
            return item
        if self._column not in item.row:
            return Refused("missing column", item.place, f"no {self._column!r} among {', '.join(map(str, item.row))}")
        value = item.row[self._column]
        if self._folder is None:
            return Refused("not token ids", item.place, f"{str(value)[:60]!r}") if isinstance(value, str) else value
        return _text(value, item.place)

    def _encode(self, texts: list[str]) -> list[Any]:
        """Return the ids of each text, or the error of one that can't be encoded."""
        if self._folder is None or not texts:
            return []
        if self._encoder is None:
            self._encoder = Encoder(self._folder, self._prefix, self._suffix)
        try:
            return self._encoder.encode(texts)
        except Exception as error:  # tokenizers raises no other class: find the text
            return [error] if len(texts) == 1 else [found for text in texts for found in self._encode([text])]


def _named(wanted: bool, found: int | None, name: str, token: str, tokenizer: Path) -> list[int]:
    if wanted and found is None:
        raise ValueError(f"{name}=True, and {tokenizer} names no {token}. Name it in its tokenizer_config.json.")
    return [found] if wanted and found is not None else []


def _text(value: Any, place: str) -> str | Refused:
    if not isinstance(value, str):
        return Refused("not a string", place, type(value).__name__)
    if not value:
        return Refused("empty", place, "the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Refused("invalid UTF-8", place, f"a lone surrogate, {value[error.start]!a}")
    return value


def _ids(value: Any, place: str) -> np.ndarray | Refused:
    if isinstance(value, Exception):
        return Refused("not encodable", place, str(value))
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        return Refused("not token ids", place, str(error))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        return Refused("not token ids", place, f"{type(value).__name__} {str(value)[:60]!r}")
    if not ids.size:
        return Refused("empty", place, "no token")
    if int(ids.min()) < 0 or int(ids.max()) >= 1 << 32:
        return Refused("not token ids", place, f"ids from {int(ids.min())} to {int(ids.max())}; they are 0 to 2^32 - 1")
    return ids.astype(np.int64)
