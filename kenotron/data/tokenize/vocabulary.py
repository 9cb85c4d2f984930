"""Tokenizers: read from where the user has them, or trained on the input, and kept beside the tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kenotron.durable import fsync_directory
from kenotron.files import check_folder, read_regular

#: The end of a document, and token 0, of a tokenizer that is trained here.
END_OF_TEXT = "<|endoftext|>"
#: Bytes, and the end of a document: no byte-level vocabulary is smaller.
_MAX_HOLES = 1 << 20  # ids below the largest that no token has
SMALLEST_VOCABULARY = 257


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a corpus needs to know of its tokenizer.

    Attributes:
        digest: of what it does to text. size: one more than its largest id. bos, eos: the tokens that begin and end a document,
            as text, None where it names none. bos_id, eos_id: their ids.
    """

    digest: str
    size: int
    bos: str | None
    eos: str | None
    bos_id: int | None
    eos_id: int | None


class Encoder:
    """Encodes texts as ``tokenizers`` does, without special tokens, never truncated or padded.

    Args:
        folder: of the tokenizer. prefix, suffix: ids that begin and end every document.
    """

    def __init__(self, folder: Path, prefix: Sequence[int], suffix: Sequence[int]) -> None:
        self._tokenizer = _plain(folder / "tokenizer.json")
        self._prefix, self._suffix = list(prefix), list(suffix)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; none at all for one that has no tokens of its own.

        Raises:
            Exception: ``tokenizers`` can't encode one of them; it says no more than this.
        """
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        if not self._prefix and not self._suffix:
            return found
        return [self._prefix + ids + self._suffix if ids else ids for ids in found]


def flat(documents: list[list[int]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return ids one after the other, and the length of each document."""
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return np.fromiter(itertools.chain.from_iterable(documents), dtype, int(lengths.sum())), lengths


def _plain(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no other class
        raise ValueError(f"{file} is no tokenizer that can be read: {error}") from None
    # What a model was fine-tuned with may stand in the file, and would cut every document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# ---- Reading --------------------------------------------------------------------------------------------------------


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Make a folder of a tokenizer, from which transformers and ``tokenizers`` read the same. Nothing is downloaded.

    Args:
        source: a ``tokenizer.json``, or a folder that ``AutoTokenizer`` reads. folder: the one to make.

    Raises:
        ValueError: there is no tokenizer at ``source``, or none that has a ``tokenizer.json``.
    """
    place = Path(source).expanduser()
    if place.is_dir() and (place / "tokenizer_config.json").is_file() | (place / "config.json").is_file():
        _save(folder, lambda new: _auto(place).save_pretrained(new))
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{source}: this tokenizer is a slow one, without tokenizer.json. Convert it to a fast one first.")
        return
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        raise ValueError(f"{source} is no tokenizer. Name a tokenizer.json, or a folder that AutoTokenizer reads.")
    try:
        _plain(file)
    except Exception as error:  # of no other class
        raise ValueError(f"{file} is no tokenizer that the tokenizers library reads: {error}") from None

    def write(new: Path) -> None:
        shutil.copyfile(file, new / "tokenizer.json")
        _write_config(new, {})

    _save(folder, write)


def _auto(place: Path) -> Any:
    from transformers import AutoTokenizer

    check_folder(place)
    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{place} is no tokenizer that AutoTokenizer reads: {error}") from error


def read_vocabulary(folder: Path, *, eos_token: str | None = None) -> Vocabulary:
    """Return what there is to know of the tokenizer in a folder.

    Args:
        folder: one that ``copy_tokenizer`` or ``train_tokenizer`` has made. eos_token: in the place of the one that it names.

    Raises:
        ValueError: it has no token ``eos_token``.
    """
    tokenizer = _plain(folder / "tokenizer.json")
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    size = max(ids, default=-1) + 1
    if size > 2 * len(ids) + _MAX_HOLES:  # writing it out takes memory for each id that is left out
        raise ValueError(f"{folder}/tokenizer.json numbers {len(ids)} tokens up to {size - 1}: it is damaged.")
    config = json.loads(read_regular(folder / "tokenizer_config.json"))
    bos, eos = _token(config.get("bos_token")), eos_token or _token(config.get("eos_token"))
    if eos_token is not None and tokenizer.token_to_id(eos_token) is None:
        raise ValueError(f"eos_token={eos_token!r} is none of this tokenizer's tokens. Name one that it has.")
    return Vocabulary(
        digest=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        size=size,
        bos=bos,
        eos=eos,
        bos_id=None if bos is None else tokenizer.token_to_id(bos),
        eos_id=None if eos is None else tokenizer.token_to_id(eos),
    )


def _token(entry: object) -> str | None:
    """Return a token as a tokenizer's configuration has it: text, or an object with it."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


# ---- Training -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str] | Iterable[str], size: int, folder: Path) -> None:
    """Train a byte-level BPE and make its folder, which ``AutoTokenizer`` reads. The same texts give the same tokenizer.

    Args:
        texts: to train on. size: of the vocabulary, with 256 bytes and the end of a document. folder: the one to make.

    Raises:
        ValueError: ``size`` is below 257.
    """
    if size < SMALLEST_VOCABULARY:
        raise ValueError(f"A vocabulary of {size} can't hold all bytes and {END_OF_TEXT}. Set it to 257 or more.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    def write(new: Path) -> None:
        tokenizer.save(str(new / "tokenizer.json"))
        _write_config(new, {"eos_token": END_OF_TEXT})

    _save(folder, write)


def _write_config(folder: Path, tokens: dict[str, str]) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _save(folder: Path, write: Any) -> None:
    """Make a folder in one step, on the disk when this returns."""
    new = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    for file in new.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    fsync_directory(new)
    os.rename(new, folder)
    fsync_directory(folder.parent)
