"""Tokenizers of transformers, from whatever a folder has of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kenotron.files import check_folder

PathLike = str | os.PathLike[str]

#: What ``AutoTokenizer`` makes a tokenizer of. ``tokenizer.json`` alone does as well, which `load_tokenizer` reads itself.
_FILES = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_FAST = "tokenizer.json"


def has_tokenizer(folder: PathLike) -> bool:
    """Return whether there is a tokenizer in a folder."""
    return any((Path(folder) / name).is_file() for name in (_FAST, *_FILES))


def load_tokenizer(place: PathLike) -> Any:
    """Return the tokenizer of a folder that ``AutoTokenizer`` reads, or of a ``tokenizer.json`` that stands alone.

    Args:
        place: the folder, or the file. Nothing is downloaded.

    Raises:
        ValueError: there is no such place, or no tokenizer in it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(place).expanduser()
    if not path.exists():
        raise ValueError(f"{place}: there is no such file or folder. Name a folder with a tokenizer, or a tokenizer.json.")
    folder, file = (path, path / _FAST) if path.is_dir() else (path.parent, path)
    if path.is_dir() and not has_tokenizer(path):
        raise ValueError(
            f"{place} has no tokenizer: none of {', '.join((_FAST, *_FILES))} is there. Name a folder that has one, or a "
            "tokenizer.json."
        )
    check_folder(folder)
    try:
        if any((folder / name).is_file() for name in _FILES) and (path.is_dir() or path.name == _FAST):
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # tokenizers raises no other class
        raise ValueError(f"{place} is no tokenizer that transformers reads: {error}") from error
