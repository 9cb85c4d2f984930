"""Fill-in-the-middle: documents rearranged so that a model learns to write what stands between two texts.

A document is cut at two places, drawn evenly, into prefix, middle and suffix, and trained in one of two orders (Bavarian et
al., arXiv 2207.14255, sections 3 and 4.1; the second is their variant 2, which StarCoder and Code Llama were trained with):

    PSM    ⟨PRE⟩ prefix ⟨SUF⟩ suffix ⟨MID⟩ middle
    SPM    ⟨PRE⟩ ⟨SUF⟩ suffix ⟨MID⟩ prefix middle

Cuts are between tokens. What stands in a sample of each document is rearranged by itself ("context level", section 4.2) and
keeps its length: it gives up its last three tokens for the three sentinels. The token that begins documents and the one that
ends them stay where they are, so that the model learns to stop after the middle.

Every draw is a function of the seed and of the sample's number in the run, as the order of samples is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kenotron.data.permutation import digest
from kenotron.data.rows import IGNORED, Rows

#: Prefix, middle and suffix, as families of tokenizers call them.
CONVENTIONS: tuple[tuple[str, str, str], ...] = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder, Granite
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen, CodeGemma
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),  # DeepSeek Coder
    ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),  # Codestral
)
#: Tokens that a document loses, and how many must be left.
_LOST, _FEWEST = 3, 3


class Sentinels(NamedTuple):
    """Ids of the tokens that precede each part."""

    prefix: int
    middle: int
    suffix: int


def permute(document: np.ndarray, start: int, stop: int, sentinels: Sentinels, *, spm: bool) -> np.ndarray:
    """Return a document with its middle, tokens [start, stop), at the end: int64 of shape (n + 3,) for n tokens."""
    pre, mid, suf = ([token] for token in sentinels)
    prefix, middle, suffix = document[:start], document[start:stop], document[stop:]
    parts = [pre, suf, suffix, mid, prefix, middle] if spm else [pre, prefix, suf, suffix, mid, middle]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def restore(tokens: np.ndarray, sentinels: Sentinels) -> np.ndarray:
    """Return the document that ``permute`` was given.

    Raises:
        ValueError: the sentinels are not there once each, in their order.
    """
    places = [np.flatnonzero(tokens == token).tolist() for token in (sentinels.prefix, sentinels.suffix, sentinels.middle)]
    if [len(place) for place in places] != [1, 1, 1] or not 0 == places[0][0] < places[1][0] < places[2][0]:
        raise ValueError(f"No document for filling in the middle: sentinels at {places}, not once each in their order.")
    suffix, middle = places[1][0], places[2][0]
    return np.concatenate([tokens[1:suffix], tokens[middle + 1 :], tokens[suffix + 1 : middle]])


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """How documents are rearranged.

    Documents that hold a sentinel already stay as they are; so do those with fewer than six tokens, and those of which not
    all is learned.

    Args:
        rate: share of documents that are rearranged. spm_rate: share of these in the order SPM.
        tokenizer: a ``tokenizer.json`` or its folder, in which names are looked up; ``None``: that of the first corpus that
            has one (``kenotron tokenize`` puts it there).
        prefix, middle, suffix: the sentinels, by name or id; ``None``: the first of ``CONVENTIONS`` that the tokenizer knows.
        bos, eos: tokens that stay at a document's begin and end, by name or id; ``None``: those of the tokenizer.
        split_token: by name or id: documents that hold it (files of a repository, say) are cut there, and each fragment is
            rearranged by itself, or not. fragment_rate: share of fragments, in documents that are chosen by ``rate``.

    Raises:
        ValueError: a rate is no share, or only some of the sentinels are named.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    tokenizer: str | None = None
    prefix: str | int | None = None
    middle: str | int | None = None
    suffix: str | int | None = None
    bos: str | int | None = None
    eos: str | int | None = None
    split_token: str | int | None = None
    fragment_rate: float = 0.5

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate", "fragment_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it is a share. Set it between 0 and 1.")
        named = [name for name in Sentinels._fields if getattr(self, name) is not None]
        if named and len(named) < 3:
            missing = ", ".join(name for name in Sentinels._fields if name not in named)
            raise ValueError(f"Of fill-in-the-middle's sentinels {', '.join(named)} is set. Set {missing} as well, or none.")

    def infiller(self, seed: int, tokenizer: Path | None = None) -> Infiller:
        """Look names up, and return what rearranges samples.

        Args:
            seed: of all draws. tokenizer: where none is set.

        Raises:
            ValueError: there is no tokenizer to look names up in, or it does not know one of them.
        """
        names = _Names.of(self.tokenizer or tokenizer)
        sentinels = Sentinels(*(names.id_of(name, getattr(self, name)) for name in Sentinels._fields))
        if len(set(sentinels)) < 3:
            raise ValueError(f"Sentinels {tuple(sentinels)}: prefix, middle and suffix are three tokens. Set different ones.")
        return Infiller(
            self,
            seed=seed,
            sentinels=sentinels,
            split=None if self.split_token is None else names.id_of("split_token", self.split_token),
            bos=names.bos if self.bos is None else names.id_of("bos", self.bos),
            eos=names.eos if self.eos is None else names.id_of("eos", self.eos),
        )


@dataclass(frozen=True)
class _Names:
    """The vocabulary in which names are looked up; empty without a tokenizer."""

    tokenizer: Path | None
    ids: dict[str, int]
    bos: int | None = None
    eos: int | None = None

    @classmethod
    def of(cls, tokenizer: str | Path | None) -> _Names:
        if tokenizer is None:
            return cls(None, {})
        from tokenizers import Tokenizer

        from kenotron.data.tokenize.vocabulary import read_vocabulary

        place = Path(tokenizer).expanduser()
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.is_file():
            raise ValueError(f"tokenizer={str(tokenizer)!r}: there is no tokenizer.json. Name one, or a folder with one.")
        ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        if not (file.parent / "tokenizer_config.json").is_file():
            return cls(place, ids)
        vocabulary = read_vocabulary(file.parent)
        return cls(place, ids, vocabulary.bos_id, vocabulary.eos_id)

    def id_of(self, field: str, token: str | int | None) -> int:
        """Return the id of a token, or by convention that of a sentinel."""
        if isinstance(token, int):
            if token < 0:
                raise ValueError(f"{field}={token}: set an id of the vocabulary, 0 or more, or the token's name.")
            return token
        if self.tokenizer is None:
            raise ValueError(
                f"{field}={token!r} can't be looked up: no corpus has its tokenizer beside it. Set FillInTheMiddle(tokenizer="
                "'path/to/tokenizer.json'), or ids."
            )
        if token is None:
            known = [names for names in CONVENTIONS if all(name in self.ids for name in names)]
            if not known:
                listed = "; ".join(" ".join(names) for names in CONVENTIONS)
                raise ValueError(
                    f"{self.tokenizer} has none of the known sentinels for filling in the middle ({listed}). Set prefix, "
                    "middle and suffix to tokens that it has."
                )
            token = known[0][Sentinels._fields.index(field)]
        if token not in self.ids:
            raise ValueError(f"{field}={token!r} is no token of {self.tokenizer}. Name one that it has, or set its id.")
        return self.ids[token]


class Infiller:
    """Rearranges the documents in rows of a batch.

    Args:
        settings: the rates. seed: of all draws. sentinels: their ids. split, bos, eos: ids, ``None`` where there is none.
    """

    def __init__(
        self,
        settings: FillInTheMiddle,
        *,
        seed: int,
        sentinels: Sentinels,
        split: int | None = None,
        bos: int | None = None,
        eos: int | None = None,
    ) -> None:
        self.sentinels = sentinels
        self._settings, self._seed = settings, seed
        self._split, self._bos, self._eos = split, bos, eos

    @property
    def largest_id(self) -> int:
        """The largest id that is put into samples."""
        return max(self.sentinels)

    def apply(self, out: Rows, first: int) -> None:
        """Rearrange documents in rows that hold the global samples from ``first`` on.

        Args:
            out: full rows, with the begins of documents.
        """
        assert out.begins is not None
        length = out.input_ids.shape[1]
        for row, begins in enumerate(out.begins):
            starts = np.flatnonzero(begins[:length]).tolist()
            for number, (start, stop) in enumerate(zip(starts, [*starts[1:], length], strict=True)):
                self._infill_between(out, row, start, stop, (first + row, number))
            out.labels[row, 1:] = out.shift_labels[row, :-1]

    def _infill_between(self, out: Rows, row: int, start: int, stop: int, key: tuple[int, int]) -> None:
        """Rearrange what stands at positions [start, stop): a document, with its last token as the last label perhaps."""
        assert out.begins is not None
        tokens, labels = out.input_ids[row], out.shift_labels[row]
        if (labels[start : stop - 1] == IGNORED).any():
            return  # padding, or prompts
        # The last label is the document's own, or the first token of the next one, or none.
        is_own = labels[stop - 1] != IGNORED
        if not out.restarts_positions and out.begins[row, stop]:
            is_own = stop < len(tokens) and labels[stop - 1] != tokens[stop]
        document = np.concatenate([tokens[start:stop], labels[stop - 1 : stop][: int(is_own)]])
        found = self._infill(document, key)
        if found is None:
            return
        if start and not out.restarts_positions and labels[start - 1] == tokens[start]:
            labels[start - 1] = found[0]
        tokens[start:stop] = found[: stop - start]
        labels[start : start + len(found) - 1] = found[1:]

    def _infill(self, document: np.ndarray, key: tuple[int, int]) -> np.ndarray | None:
        """Return a document rearranged, of the same length, or ``None`` where it stays as it is."""
        if self._draws(*key)[0] >= self._settings.rate * 2**64 or np.isin(document, self.sentinels).any():
            return None
        start = int(len(document) > 0 and document[0] == self._bos)
        stop = len(document) - int(len(document) > start and document[-1] == self._eos)
        found = document.copy()
        cuts = np.flatnonzero(found[start:stop] == self._split) + start if self._split is not None else np.zeros(0, np.int64)
        if not len(cuts):
            found[start:stop] = self._fitted(found[start:stop], self._draws(*key)[1:])
            return found
        begins = [start, *(cuts + 1).tolist()]
        for number, (begin, end) in enumerate(zip(begins, [*cuts.tolist(), stop], strict=True)):
            draws = self._draws(*key, number)
            if draws[0] < self._settings.fragment_rate * 2**64:
                found[begin:end] = self._fitted(found[begin:end], draws[1:])
        return found

    def _fitted(self, text: np.ndarray, draws: list[int]) -> np.ndarray:
        """Return text rearranged without its last tokens, so that it keeps its length; as it is where it is too short."""
        kept = text[: max(len(text) - _LOST, 0)]
        if len(kept) < _FEWEST:
            return text
        start, stop = sorted(draw * (len(kept) + 1) >> 64 for draw in draws[1:3])
        return permute(kept, start, stop, self.sentinels, spm=draws[0] < self._settings.spm_rate * 2**64)

    def _draws(self, *key: int) -> list[int]:
        """Return eight numbers of 64 bits, even and independent, for a key."""
        found: list[int] = np.frombuffer(digest("fim", self._seed, *key), dtype="<u8").tolist()
        return found
