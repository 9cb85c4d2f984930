"""Datasets and sequences of rows as corpora: the tokens of ``kenotron tokenize``, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kenotron.data.corpus import check, open_corpus
from kenotron.data.errors import CorpusVocabularyError
from kenotron.data.hf_datasets import DatasetCorpus
from kenotron.data.records import is_mapped_dataset, records_of
from kenotron.data.tokenize import tokenize
from kenotron.data.tokenize.shards import BadInputError
from kenotron.data.tokenize.vocabulary import train_tokenizer

TEXTS = ["def f():\n    return 1\n", "ü 🙂 text", "x" * 5000, "a", " "] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TEXTS, 300, place)
    return place


def contents(made: DatasetCorpus) -> tuple[list[int], list[int]]:
    made.make()
    source = made.open("c")
    return source.read(0, source.num_tokens).tolist(), source.ends(0, source.num_documents).tolist()


@pytest.mark.parametrize("append_eos", [False, True])
def test_rows_become_the_tokens_that_files_do(folder: Path, tmp_path: Path, append_eos: bool) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenize(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=folder, workers=1, append_eos=append_eos)
    wanted = open_corpus(tmp_path / "out")
    rows = [{"text": text, "more": 3} for text in TEXTS]
    for given in (rows, datasets.Dataset.from_list(rows), str(tmp_path / "a.jsonl")):
        ids, ends = contents(DatasetCorpus(given, folder, append_eos=append_eos, cache_dir=tmp_path / "cache"))
        assert ids == wanted.read(0, wanted.num_tokens).tolist()
        assert ends == wanted.ends(0, wanted.num_documents).tolist()


def test_columns_of_ids_need_no_tokenizer(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": list(range(n, 2 * n + 1))} for n in range(1, 20)]
    arrays = [{"input_ids": np.asarray(row["input_ids"], np.uint16)} for row in rows]
    found = [contents(DatasetCorpus(given, cache_dir=tmp_path)) for given in (rows, arrays, datasets.Dataset.from_list(rows))]
    assert found[0][0] == [token for row in rows for token in row["input_ids"]]
    assert found[1] == found[2] == found[0]
    made = DatasetCorpus([{"input_ids": [0, 2**32 - 1]}], cache_dir=tmp_path)
    assert contents(made) == ([0, 2**32 - 1], [2])
    assert not check(open_corpus(made.folder()))[0].problems
    with pytest.raises(CorpusVocabularyError):
        made.open("c", vocab_size=100)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": None}, "not a string"),
        ({"text": 3}, "not a string"),
        ({"text": ""}, "empty"),
        ({"text": "\ud800"}, "invalid UTF-8"),
        ({"other": "x"}, "missing column"),
        (["x"], "not a mapping"),
    ],
)
def test_rows_that_are_no_text_are_told_or_counted(folder: Path, tmp_path: Path, row: Any, kind: str) -> None:
    rows = [{"text": "a"}, row, {"text": "b"}]
    with pytest.raises(BadInputError, match=f"row 1: {kind}"):
        DatasetCorpus(rows, folder, cache_dir=tmp_path).make()
    made = DatasetCorpus(rows, folder, cache_dir=tmp_path, on_error="skip")
    assert len(contents(made)[1]) == 2
    assert json.loads((made.folder() / "corpus.json").read_text())["skipped"] == {kind: 1}


@pytest.mark.parametrize("ids", ["text", [[1]], [1.5], [-1], [2**32], None, [None], {"a": 1}])
def test_what_is_no_list_of_ids_is_told(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(BadInputError, match="row 0: not token ids"):
        DatasetCorpus([{"input_ids": ids}], cache_dir=tmp_path).make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"append_eos": True}, "take a tokenizer"),
        ({"tokenizer": "/nowhere"}, "is no tokenizer"),
        ({"dataset": 7}, "A int can't be read"),
        ({"dataset": "/nowhere.jsonl"}, "no such file"),
        ({"dataset": []}, "No document came of"),
        ({"dataset": [{"input_ids": {1, 2}}]}, "row 0 holds more than text"),
        ({"on_error": "x"}, "on_error='x'"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DatasetCorpus(**{"dataset": [{"input_ids": [1, 2]}], "cache_dir": tmp_path, **change}).make()


def test_a_tokenizer_without_an_end_is_told(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "t"
    place.mkdir()
    (place / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="append_eos=True, and"):
        DatasetCorpus([{"text": "a"}], place, append_eos=True, cache_dir=tmp_path / "c").make()


def test_fingerprints_of_datasets_are_equal_in_all_processes_and_change_with_the_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text} for text in TEXTS]
    one, two = (datasets.Dataset.from_list(rows) for _ in range(2))
    assert is_mapped_dataset(one) and records_of(one).digest() == records_of(two).digest()
    assert records_of(one.select(range(3))).digest() != records_of(one).digest()
    with pytest.raises(ValueError, match="Give one"):
        records_of(datasets.DatasetDict({"train": one}))


def test_corpora_of_the_same_rows_and_another_tokenizer_are_apart(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["other"], 280, tmp_path / "other")
    rows = [{"text": "a"}]
    assert DatasetCorpus(rows, folder).folder() != DatasetCorpus(rows, tmp_path / "other").folder()
