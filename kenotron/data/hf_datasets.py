"""Map-style datasets of texts, or of token ids, as corpora: tokenised once, and then read like files of tokens."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kenotron.data.made import Made, MadeCorpus, Refused, in_batches, tokenizer_digest
from kenotron.data.records import records_of
from kenotron.data.tokenize.vocabulary import Encoder, Vocabulary

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
        if vocabulary is None:
            yield from map(self._ids, self._values(shard))
            return
        encode = text_encoder(folder, vocabulary, self._prepend_bos, self._append_eos)
        for batch in in_batches(self._values(shard), lambda item: len(str(item[1])), _BATCH_CHARACTERS):
            encoded = iter(encode_all(encode, [value for _, value in batch if isinstance(value, str)]))
            for place, value in batch:
                yield value if isinstance(value, Refused) else _document(place, next(encoded))

    def _values(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Yield (place, value of the column), where the value is refused, or as it is."""
        for item in self._records.read(shard):
            if isinstance(item, Refused):
                yield item.place, item
            elif self._column not in item.row:
                yield item.place, Refused("missing column", item.place, f"no {self._column!r} among {', '.join(item.row)}")
            else:
                value = item.row[self._column]
                if self.tokenizer is not None:
                    value = text_or_refused(value, item.place)
                yield item.place, value

    @staticmethod
    def _ids(item: tuple[str, Any]) -> Made | Refused:
        place, value = item
        if isinstance(value, Refused):
            return value
        try:
            ids = np.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            return Refused("not token ids", place, str(error))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            return Refused("not token ids", place, f"{type(value).__name__} {str(value)[:60]!r}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
            return Refused("not token ids", place, f"ids from {int(ids.min())} to {int(ids.max())}; they are 0 to 2^32 - 1")
        return _document(place, ids)


def text_or_refused(value: Any, place: str) -> str | Refused:
    """Return a text, or what is wrong with it."""
    if not isinstance(value, str):
        return Refused("not a string", place, type(value).__name__)
    if not value:
        return Refused("empty", place, "the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Refused("invalid UTF-8", place, f"a lone surrogate, {value[error.start]!a}")
    return value


def text_encoder(folder: Path, vocabulary: Vocabulary, prepend_bos: bool, append_eos: bool) -> Encoder:
    """Return what encodes texts, with the tokens around each.

    Raises:
        ValueError: the tokenizer does not name such a token.
    """
    for wanted, found, name in ((prepend_bos, vocabulary.bos_id, "prepend_bos"), (append_eos, vocabulary.eos_id, "append_eos")):
        if wanted and found is None:
            raise ValueError(f"{name}=True, and the tokenizer names no token for it. Name it in its tokenizer_config.json.")
    prefix = [vocabulary.bos_id] if prepend_bos and vocabulary.bos_id is not None else []
    suffix = [vocabulary.eos_id] if append_eos and vocabulary.eos_id is not None else []
    return Encoder(folder, prefix, suffix)


def encode_all(encoder: Encoder, texts: list[str]) -> list[Any]:
    """Return the ids of each text, or the error of one that can't be encoded."""
    try:
        return encoder.encode(texts)
    except Exception:  # tokenizers raises no other class: find the text
        return [_encoded(encoder, text) for text in texts]


def _encoded(encoder: Encoder, text: str) -> Any:
    try:
        return encoder.encode([text])[0]
    except Exception as error:
        return error


def _document(place: str, ids: Any) -> Made | Refused:
    if isinstance(ids, Exception):
        return Refused("not encodable", place, str(ids))
    return Made(ids) if len(ids) else Refused("empty", place, "no token")
