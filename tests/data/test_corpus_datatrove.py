"""Files that datatrove itself has written."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from tokenizers import Tokenizer, models, pre_tokenizers

from kenotron.data.corpus import check, open_corpus
from kenotron.data.nanoset import NanosetSource, NanosetWriter

TEXTS = ["a b c", "b", "c c c c a", "a b", "<end> c"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def tokenise(tokenizer: Path, out: Path, **options: object) -> None:
    step = DocumentTokenizer(str(out), str(tokenizer), eos_token="<end>", **options)
    step.run(Document(text=text, id=str(number)) for number, text in enumerate(TEXTS))


def test_what_datatrove_tokenises_is_read(tokenizer: Path, tmp_path: Path) -> None:
    tokenise(tokenizer, tmp_path / "out", shuffle_documents=False)
    source = open_corpus(tmp_path / "out", vocab_size=5)
    assert isinstance(source, NanosetSource)
    assert source.read(0, source.num_tokens).tolist() == [0, 1, 2, 3, 1, 3, 2, 2, 2, 2, 0, 3, 0, 1, 3, 3, 2, 3]
    assert source.ends(0, source.num_documents).tolist() == [4, 6, 12, 15, 18]
    assert source.tokenizer == str(tokenizer)
    assert not any(found.problems for found in check(source, vocab_size=5))


def test_shuffled_files_of_datatrove_are_joined(tokenizer: Path, tmp_path: Path) -> None:
    tokenise(tokenizer, tmp_path / "out", shuffle_documents=True, max_tokens_per_file=6, seed=0)
    source = open_corpus(tmp_path / "out")
    bounds = [0, *source.ends(0, source.num_documents)]
    documents = sorted(tuple(source.read(a, b).tolist()) for a, b in itertools.pairwise(bounds))
    assert documents == [(0, 1, 2, 3), (0, 1, 3), (1, 3), (2, 2, 2, 2, 0, 3), (3, 2, 3)]
    assert len(list((tmp_path / "out").glob("*.ds"))) > 1


@pytest.mark.parametrize("token_size", [2, 4])
def test_our_files_are_datatroves_byte_for_byte(tmp_path: Path, token_size: int) -> None:
    documents = [[1, 2, 3], [], [60_000] * 1200]
    theirs = TokenizedFile(
        str(tmp_path / "theirs"), "x.ds", tokenizer_name_or_path="gpt2", save_final_metadata=True, token_size=token_size
    )
    for document in documents:
        theirs.write(document, None)
    theirs.close()
    with NanosetWriter(tmp_path / "ours" / "x.ds", token_size=token_size, tokenizer="gpt2") as ours:
        for document in documents:
            ours.write(np.array(document))
    for name in ("x.ds", "x.ds.index", "x.ds.metadata"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
