"""Corpora: files, folders, globs and lists as one source; what does not belong together is refused before training."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kenotron.data.corpus import JoinedSource, check, find_tokenizer, open_corpus
from kenotron.data.errors import (
    CorpusFileMissingError,
    CorpusIndexError,
    CorpusMetadataError,
    CorpusSizeError,
    CorpusUnfinishedError,
    CorpusVocabularyError,
    EmptyCorpusError,
)
from kenotron.data.megatron import MegatronWriter
from kenotron.data.nanoset import NanosetSource, NanosetWriter
from kenotron.data.source import ArraySource


def write_ds(path: Path, documents: list[list[int]], token_size: int = 2) -> Path:
    with NanosetWriter(path, token_size=token_size) as writer:
        for document in documents:
            writer.write(document)
    return path


def write_bin(path: Path, documents: list[list[int]], dtype: str = "int32") -> Path:
    with MegatronWriter(path, dtype=dtype) as writer:
        for document in documents:
            writer.write(document)
    return path


PARTS = [[[1, 2], [3]], [[], [4, 5, 6]], [], [[7], []], [[8, 9]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files: both formats, nested, one without documents."""
    write_ds(tmp_path / "a.ds", PARTS[0])
    write_bin(tmp_path / "b.bin", PARTS[1])
    write_ds(tmp_path / "c" / "a.ds", PARTS[2], 4)
    write_ds(tmp_path / "c" / "b" / "x.ds", PARTS[3], 4)
    write_bin(tmp_path / "d.bin", PARTS[4], "uint16")
    (tmp_path / ".hidden").mkdir()
    write_ds(tmp_path / ".hidden" / "x.ds", [[99]])
    (tmp_path / "notes.txt").write_text("of no interest")
    return tmp_path


def test_folder_is_one_source_of_all_its_files_in_order(folder: Path) -> None:
    source = open_corpus(folder)
    truth = ArraySource("truth", [np.array(document) for part in PARTS for document in part])
    assert (source.num_tokens, source.num_documents, source.name) == (9, 7, folder.name)
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for start in range(10):
            for stop in range(start, 10):
                assert opened.read(start, stop).tolist() == truth.read(start, stop).tolist()
        for first in range(8):
            for last in range(first, 8):
                assert opened.ends(first, last).tolist() == truth.ends(first, last).tolist()
        assert [opened.document_of(at) for at in range(9)] == [truth.document_of(at) for at in range(9)]
    assert [found.problems for found in check(source, vocab_size=10)] == [()] * 5
    with pytest.raises(IndexError):
        source.read(0, 10)


def test_globs_lists_and_either_file_of_a_pair_are_paths(folder: Path) -> None:
    def read(path: object) -> list[int]:
        source = open_corpus(path)  # type: ignore[arg-type]
        return source.read(0, source.num_tokens).tolist()

    assert read(str(folder / "*.ds")) == [1, 2, 3]
    assert read(str(folder / "**" / "*.ds")) == [1, 2, 3, 7]
    assert read(str(folder / "[cd]*")) == [7, 8, 9]
    assert read([folder / "d.bin", folder / "a.ds"]) == [8, 9, 1, 2, 3]
    for name in ("b.bin", "b.idx", "b"):
        assert read(folder / name) == [4, 5, 6]
    for name in ("a.ds", "a.ds.index", "a.ds.metadata"):
        assert read(str(folder / name)) == [1, 2, 3]


def test_names_are_those_of_the_paths_or_as_told(folder: Path) -> None:
    assert open_corpus(folder / "a.ds").name == "a"
    assert open_corpus(folder / "a.ds", name="web").name == "web"
    assert open_corpus([folder / "a.ds", folder / "b.bin"]).name == "a+b.bin"
    assert isinstance(open_corpus(folder / "a.ds"), NanosetSource)
    assert isinstance(open_corpus(folder, name="web"), JoinedSource)


def test_what_is_no_corpus_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"local file.*Copy"):
        open_corpus("s3://bucket/x.ds")
    with pytest.raises(ValueError, match="at least one"):
        open_corpus([])
    with pytest.raises(ValueError, match="named twice"):
        open_corpus([folder, folder / "a.ds"])
    with pytest.raises(ValueError, match="no file of tokens"):
        open_corpus(folder / "notes.txt")
    with pytest.raises(CorpusFileMissingError, match="no such file"):
        open_corpus(folder / "nothing.ds")
    with pytest.raises(CorpusFileMissingError, match="matches"):
        open_corpus(str(folder / "z*"))
    with pytest.raises(ValueError, match="token_size=2"):
        open_corpus(folder / "b.bin", token_size=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyCorpusError, match=r"no \.ds or \.bin"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(EmptyCorpusError, match="no token"):
        open_corpus(folder / "c" / "a.ds")


@pytest.mark.parametrize("lost", ["a.ds", "b.bin", "b.idx"])
def test_file_that_lost_its_companion_is_not_left_out_in_silence(folder: Path, lost: str) -> None:
    os.remove(folder / lost)
    with pytest.raises(CorpusFileMissingError, match=lost):
        open_corpus(folder)


def test_truncated_file_among_many_is_named(folder: Path) -> None:
    os.truncate(folder / "c" / "b" / "x.ds", 2)
    with pytest.raises(CorpusSizeError, match=r"x\.ds, byte 0"):
        open_corpus(folder)


def test_another_tokenizers_ids_are_found_before_training(tmp_path: Path) -> None:
    path = write_ds(tmp_path / "x.ds", [[1, 2, 50_000], [3]])
    open_corpus(path, vocab_size=50_001)
    with pytest.raises(CorpusVocabularyError, match=r"x\.ds, byte 4: token id 50000.*has 50000"):
        open_corpus(path, vocab_size=50_000)
    path = write_bin(tmp_path / "y.bin", [[1, 2], [3]])
    ids = np.fromfile(path, "<i4")
    ids[1] = -1
    ids.tofile(path)
    with pytest.raises(CorpusVocabularyError, match="byte 4: token id -1"):
        open_corpus(path, vocab_size=10)
    with pytest.raises(ValueError, match="vocab_size=0"):
        open_corpus(path, vocab_size=0)


def test_check_finds_a_single_id_that_strayed_and_a_single_end_out_of_order(tmp_path: Path) -> None:
    documents = [[1] * 100 for _ in range(10_000)]
    path = write_ds(tmp_path / "x.ds", documents)
    ids, ends = np.fromfile(path, "<u2"), np.fromfile(f"{path}.index", "<u8")
    ids[123_456] = 1000
    ends[777] = 77_701
    ends[778] = 77_699
    ids.tofile(path)
    ends.tofile(f"{path}.index")
    source = open_corpus(path, vocab_size=1000)  # looks at some ids
    seen: list[object] = []
    (found,) = check(source, vocab_size=1000, on_file=seen.append)
    index, vocabulary = found.problems
    assert isinstance(index, CorpusIndexError)
    assert (index.path.name, index.offset) == ("x.ds.index", 778 * 8)
    assert isinstance(vocabulary, CorpusVocabularyError)
    assert (vocabulary.path, vocabulary.offset) == (path, 123_456 * 2)
    assert seen == [found]
    assert check(source)[0].max_token_id == 1000


@pytest.mark.parametrize(
    ("dtype", "at", "value", "found_at"),
    [
        ("<i4", 34, 3, 34 + 12 + 8),  # the first sequence is longer than the begin of the second one says
        ("<i4", 34 + 4, -1, 34 + 4),
        ("<i8", 34 + 12 + 8, 4, 34 + 12 + 8),
        ("<i8", 34 + 12 + 24 + 8, 5, 34 + 12 + 24 + 8),
    ],
)
def test_check_finds_what_is_wrong_inside_a_megatron_index(
    tmp_path: Path, dtype: str, at: int, value: int, found_at: int
) -> None:
    path = write_bin(tmp_path / "x.bin", [[1, 2], [3], [4]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    entry = np.array([value], dtype).tobytes()
    index[at : at + len(entry)] = entry
    (tmp_path / "x.idx").write_bytes(index)
    (found,) = check(open_corpus(path))
    (problem,) = found.problems
    assert isinstance(problem, CorpusIndexError)
    assert (problem.path.name, problem.offset) == ("x.idx", found_at)


def test_check_is_for_files_alone() -> None:
    with pytest.raises(ValueError, match="open_corpus"):
        check(ArraySource("x", []))


def record(folder: Path, **entries: object) -> None:
    (folder / "corpus.json").write_text(json.dumps({"version": 1, "complete": True, "files": []} | entries))


def test_record_of_a_tokenisation_tells_what_is_unfinished_missing_or_out_of_the_vocabulary(tmp_path: Path) -> None:
    write_ds(tmp_path / "00000.ds", [[1, 2]])
    record(tmp_path, complete=False)
    with pytest.raises(CorpusUnfinishedError, match="goes on"):
        open_corpus(tmp_path)
    there = {"name": "00000.ds", "bytes": 4, "num_documents": 1}
    record(tmp_path, files=[there, there | {"name": "00001.ds"}])
    with pytest.raises(CorpusFileMissingError, match="00001"):
        open_corpus(tmp_path)
    record(tmp_path, files=[there | {"bytes": 6}])
    with pytest.raises(CorpusSizeError, match="byte 4"):
        open_corpus(tmp_path)
    record(tmp_path, files=[there | {"num_documents": 2}])
    with pytest.raises(CorpusSizeError, match=r"00000\.ds\.index.* 2 documents"):
        open_corpus(tmp_path)
    record(tmp_path, files=[there])
    open_corpus(tmp_path)
    (tmp_path / "00000.ds.index").rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusFileMissingError, match=r"00000\.ds\.index"):
        open_corpus(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "00000.ds.index")
    record(tmp_path, max_token_id=99)
    with pytest.raises(CorpusVocabularyError, match="token id 99"):
        open_corpus(tmp_path, vocab_size=50)
    open_corpus(tmp_path, vocab_size=100)
    for content in ("", "[]", '{"version": 2}'):
        (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(CorpusMetadataError):
            open_corpus(tmp_path)


def test_tokenizer_of_a_corpus_is_found_from_any_path_in_it(tmp_path: Path) -> None:
    write_ds(tmp_path / "00000.ds", [[1, 2]])
    assert find_tokenizer(tmp_path) is None
    record(tmp_path)
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    for path in (tmp_path, tmp_path / "00000.ds", str(tmp_path / "*.ds")):
        assert find_tokenizer(path) == tmp_path / "tokenizer"
