"""Nanoset and Megatron files: byte for byte what their specifications say, and refused by name where they are not."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.errors import (
    CorpusFileMissingError,
    CorpusHeaderError,
    CorpusIndexError,
    CorpusMetadataError,
    CorpusSizeError,
)
from kenotron.data.megatron import MegatronSource, MegatronWriter
from kenotron.data.nanoset import NanosetSource, NanosetWriter
from kenotron.data.publish import UNFINISHED
from kenotron.data.source import ArraySource, TokenSource

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 65535], []]


def agree(source: TokenSource, documents: list[list[int]]) -> None:
    """Compare all that a source answers with the one in memory."""
    truth = ArraySource("truth", [np.array(document, dtype=np.int64) for document in documents])
    tokens, count = truth.num_tokens, truth.num_documents
    assert (source.num_tokens, source.num_documents) == (tokens, count)
    for start in range(tokens + 1):
        for stop in range(start, tokens + 1):
            read = source.read(start, stop)
            assert read.dtype == np.int64
            assert read.tolist() == truth.read(start, stop).tolist()
    for first in range(count + 1):
        for last in range(first, count + 1):
            ends = source.ends(first, last)
            assert ends.dtype == np.int64
            assert ends.tolist() == truth.ends(first, last).tolist()
    for position in range(tokens):
        assert source.document_of(position) == truth.document_of(position)


def nanoset(folder: Path, *, width: int = 2, metadata: str | None = "gpt2|{width}\n{tokens}\n7.00 T") -> Path:
    path = folder / "x.ds"
    flat = [token for document in DOCUMENTS for token in document]
    path.write_bytes(struct.pack(f"<{len(flat)}{'H' if width == 2 else 'I'}", *flat))
    ends = np.cumsum([len(document) for document in DOCUMENTS]).tolist()
    (folder / "x.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata is not None:
        (folder / "x.ds.metadata").write_text(metadata.format(width=width, tokens=len(flat)))
    return path


def megatron(folder: Path, *, code: int = 8, layout: str = "H", sequences: list[int] | None = None, **header: object) -> Path:
    """Write the documents; an empty one is an empty sequence."""
    flat = [token for document in DOCUMENTS for token in document]
    sizes = [len(document) for document in DOCUMENTS]
    documents = list(range(len(sizes) + 1)) if sequences is None else sequences
    width = struct.calcsize(layout)
    begins = [width * sum(sizes[:i]) for i in range(len(sizes))]
    path = folder / "x.bin"
    path.write_bytes(struct.pack(f"<{len(flat)}{layout}", *flat))
    (folder / "x.idx").write_bytes(
        header.get("magic", b"MMIDIDX\x00\x00")  # type: ignore[operator]
        + struct.pack("<QBQQ", header.get("version", 1), code, len(sizes), len(documents))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(begins)}q", *begins)
        + struct.pack(f"<{len(documents)}q", *documents)
    )
    return path


# ---- Nanoset --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("metadata", ["gpt2|{width}\n{tokens}\n7.00 T", "gpt2\n{tokens}\n7.00 T", None])
def test_nanoset_made_by_hand_is_read(tmp_path: Path, width: int, metadata: str | None) -> None:
    source = NanosetSource(nanoset(tmp_path, width=width, metadata=metadata))
    agree(source, DOCUMENTS)
    assert source.tokenizer == (None if metadata is None else "gpt2")
    agree(pickle.loads(pickle.dumps(source)), DOCUMENTS)


@pytest.mark.parametrize("width", [2, 4])
def test_nanoset_written_has_the_bytes_of_one_made_by_hand(tmp_path: Path, width: int) -> None:
    path = nanoset(tmp_path, width=width)
    (tmp_path / "new").mkdir()
    with NanosetWriter(tmp_path / "new" / "x.ds", token_size=width, tokenizer="gpt2") as writer:
        for document in DOCUMENTS:
            writer.write(document)
        assert os.listdir(tmp_path / "new") and not (tmp_path / "new" / "x.ds").exists()
    assert sorted(os.listdir(tmp_path / "new")) == ["x.ds", "x.ds.index", "x.ds.metadata"]
    for name in os.listdir(tmp_path / "new"):
        assert (tmp_path / "new" / name).read_bytes() == (path.parent / name).read_bytes(), name


def test_nanoset_without_index_is_one_document_if_its_metadata_counts_the_tokens(tmp_path: Path) -> None:
    path = nanoset(tmp_path)
    os.remove(f"{path}.index")
    with pytest.warns(UserWarning, match="one document"):
        source = NanosetSource(path)
    agree(source, [[token for document in DOCUMENTS for token in document]])
    os.remove(f"{path}.metadata")
    with pytest.raises(CorpusFileMissingError, match="cut off"):
        NanosetSource(path)


def test_nanoset_whose_metadata_names_a_tokenizer_with_a_bar_is_read(tmp_path: Path) -> None:
    assert NanosetSource(nanoset(tmp_path, metadata="a|b|{width}\n{tokens}\n")).tokenizer == "a|b"
    assert NanosetSource(nanoset(tmp_path, metadata="a|b\n{tokens}\n")).tokenizer == "a|b"


def test_empty_nanoset_is_one_without_documents(tmp_path: Path) -> None:
    for suffix in ("", ".index"):
        (tmp_path / f"x.ds{suffix}").touch()
    agree(NanosetSource(tmp_path / "x.ds"), [])


@pytest.mark.parametrize(
    ("damage", "error", "file", "offset"),
    [
        (lambda path: os.truncate(path, 13), CorpusSizeError, "x.ds", 12),
        (lambda path: os.truncate(path, 12), CorpusSizeError, "x.ds", 12),
        (lambda path: os.truncate(path, 0), CorpusSizeError, "x.ds", 0),
        (lambda path: os.truncate(path, 16), CorpusSizeError, "x.ds", 14),
        (lambda path: os.truncate(f"{path}.index", 39), CorpusSizeError, "x.ds.index", 32),
        (lambda path: os.truncate(f"{path}.index", 8), CorpusSizeError, "x.ds", 6),
        (lambda path: os.truncate(f"{path}.index", 0), CorpusSizeError, "x.ds", 0),
        (lambda path: Path(f"{path}.index").write_bytes(struct.pack("<Q", 2**63)), CorpusSizeError, "x.ds", 14),
        (lambda path: Path(f"{path}.metadata").write_text("gpt2|2\n8\n"), CorpusSizeError, "x.ds", 14),
        (lambda path: Path(f"{path}.metadata").write_text("gpt2|3\n7\n"), CorpusMetadataError, "x.ds.metadata", 5),
        (lambda path: Path(f"{path}.metadata").write_text("gpt2|2"), CorpusMetadataError, "x.ds.metadata", 7),
        (lambda path: Path(f"{path}.metadata").write_text("gpt2|2\nmany\n"), CorpusMetadataError, "x.ds.metadata", 7),
        (lambda path: Path(f"{path}.metadata").write_bytes(b"gp\xff\n7\n"), CorpusMetadataError, "x.ds.metadata", 2),
        (lambda path: Path(f"{path}.metadata").write_bytes(b""), CorpusMetadataError, "x.ds.metadata", 1),
        (lambda path: Path(f"{path}.metadata").write_text("g|2\n" + "9" * 5000), CorpusMetadataError, "x.ds.metadata", 4),
    ],
)  # fmt: skip
def test_damaged_nanoset_is_refused_with_file_and_offset(tmp_path: Path, damage, error, file: str, offset: int) -> None:  # type: ignore[no-untyped-def]
    path = nanoset(tmp_path)
    damage(path)
    with pytest.raises(error) as raised:
        NanosetSource(path)
    assert (raised.value.path.name, raised.value.offset) == (file, offset)
    assert f"byte {offset}" in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_token_size_is_asked_for_only_where_nothing_tells(tmp_path: Path) -> None:
    path = nanoset(tmp_path, metadata=None)
    with pytest.raises(ValueError, match=r"token_size=4.*have 2 bytes"):
        NanosetSource(path, token_size=4)
    with pytest.raises(ValueError, match="2 or 4"):
        NanosetSource(path, token_size=3)
    os.truncate(path, 15)
    with pytest.raises(CorpusSizeError, match="neither with 2 bytes"):
        NanosetSource(path)


# ---- Megatron -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "layout"), [(4, "i"), (5, "q"), (8, "H")])
def test_megatron_made_by_hand_is_read(tmp_path: Path, code: int, layout: str) -> None:
    path = megatron(tmp_path, code=code, layout=layout)
    for name in (path, path.with_suffix(".idx"), path.with_suffix("")):
        agree(MegatronSource(name), DOCUMENTS)
    agree(pickle.loads(pickle.dumps(MegatronSource(path))), DOCUMENTS)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_integer_type_of_megatron_is_written_and_read(tmp_path: Path, dtype: str) -> None:
    documents = [[1, 2, 3], [], [np.iinfo(dtype).max]]
    with MegatronWriter(tmp_path / "x", dtype=dtype) as writer:
        for document in documents:
            writer.write(document)
    agree(MegatronSource(tmp_path / "x"), documents)
    with pytest.raises(ValueError, match="does not fit"), MegatronWriter(tmp_path / "y", dtype=dtype) as writer:
        writer.write([-1])


def test_megatron_written_has_the_bytes_of_one_made_by_hand(tmp_path: Path) -> None:
    path = megatron(tmp_path)
    with MegatronWriter(tmp_path / "new" / "x", dtype="uint16") as writer:
        writer.write_documents([1, 2, 3, 4], [3, 0, 1])
        writer.write_documents([5, 6, 65535], [3, 0])
    assert sorted(os.listdir(tmp_path / "new")) == ["x.bin", "x.idx"]
    for name in os.listdir(tmp_path / "new"):
        assert (tmp_path / "new" / name).read_bytes() == (path.parent / name).read_bytes(), name


def test_megatron_document_of_several_sequences_is_one(tmp_path: Path) -> None:
    path = megatron(tmp_path, sequences=[0, 0, 3, 3, 5])
    agree(MegatronSource(path), [[], [1, 2, 3, 4], [], [5, 6, 65535]])


def test_megatron_document_longer_than_a_length_holds_becomes_several_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kenotron.data.megatron._LONGEST", 2)
    with MegatronWriter(tmp_path / "x", dtype="uint16") as writer:
        writer.write_documents([1, 2, 3, 4, 5, 6, 7], [5, 0, 2])
    source = MegatronSource(tmp_path / "x")
    assert source.num_sequences == 5
    agree(source, [[1, 2, 3, 4, 5], [], [6, 7]])


@pytest.mark.parametrize(
    ("damage", "error", "file", "offset"),
    [
        (lambda path: os.truncate(path, 13), CorpusSizeError, "x.bin", 12),
        (lambda path: os.truncate(path, 12), CorpusSizeError, "x.bin", 12),
        (lambda path: os.truncate(path, 0), CorpusSizeError, "x.bin", 0),
        (lambda path: os.truncate(path.with_suffix(".idx"), 0), CorpusHeaderError, "x.idx", 0),
        (lambda path: os.truncate(path.with_suffix(".idx"), 20), CorpusSizeError, "x.idx", 20),
        (lambda path: os.truncate(path.with_suffix(".idx"), 100), CorpusSizeError, "x.idx", 100),
        (lambda path: megatron(path.parent, magic=b"MMIDIDX\x00\x01"), CorpusHeaderError, "x.idx", 0),
        (lambda path: megatron(path.parent, version=2), CorpusHeaderError, "x.idx", 9),
        (lambda path: megatron(path.parent, code=7), CorpusHeaderError, "x.idx", 17),
        (lambda path: megatron(path.parent, code=9), CorpusHeaderError, "x.idx", 17),
        (lambda path: megatron(path.parent, code=4), CorpusSizeError, "x.bin", 12),
        (lambda path: megatron(path.parent, sequences=[0, 3]), CorpusIndexError, "x.idx", 34 + 60 + 8),
        (lambda path: megatron(path.parent, sequences=[1, 5]), CorpusIndexError, "x.idx", 34 + 60),
        (lambda path: megatron(path.parent, sequences=[]), CorpusIndexError, "x.idx", 26),
        (lambda path: os.remove(path), CorpusFileMissingError, "x.bin", None),
        (lambda path: os.remove(path.with_suffix(".idx")), CorpusFileMissingError, "x.idx", None),
    ],
)  # fmt: skip
def test_damaged_megatron_is_refused_with_file_and_offset(  # type: ignore[no-untyped-def]
    tmp_path: Path, damage, error, file: str, offset: int
) -> None:
    path = megatron(tmp_path)
    damage(path)
    with pytest.raises(error) as raised:
        MegatronSource(path)
    assert (raised.value.path.name, raised.value.offset) == (file, offset)


# ---- Both -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=6), max_size=8))
def test_what_is_written_is_read(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("written")
    with NanosetWriter(folder / "x.ds", token_size=2) as one, MegatronWriter(folder / "x", dtype="int32") as other:
        for document in documents:
            one.write(np.array(document, dtype=np.uint16))
            other.write(np.array(document, dtype=np.int64))
    agree(NanosetSource(folder / "x.ds"), documents)
    agree(MegatronSource(folder / "x.bin"), documents)


def writers(path: Path) -> list[NanosetWriter | MegatronWriter]:
    return [NanosetWriter(path / "x.ds", token_size=2), MegatronWriter(path / "x.bin", dtype="uint16")]


def test_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for writer in writers(tmp_path):
        with pytest.raises(ValueError, match="65536 does not fit"), writer:
            writer.write_documents([1, 65536], [1, 1])
    assert os.listdir(tmp_path) == []


def test_writer_killed_leaves_no_final_name(tmp_path: Path) -> None:
    for writer in writers(tmp_path):
        writer.write([1, 2, 3])
    assert all(name.startswith(".") and name.endswith(UNFINISHED) for name in os.listdir(tmp_path))
    for writer in writers(tmp_path):  # and stands in nobody's way
        writer.abort()


def test_writer_refuses_what_is_not_a_document(tmp_path: Path) -> None:
    for number, writer in enumerate(writers(tmp_path)):
        with writer:
            with pytest.raises(ValueError, match="sum up to 3"):
                writer.write_documents([1, 2], [1, 2])
            with pytest.raises(ValueError, match="integers"):
                writer.write([0.5])
        with pytest.raises(FileExistsError, match="there already"):
            writers(tmp_path / "other" if number > 1 else tmp_path)


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    for source in (NanosetSource(nanoset(tmp_path)), MegatronSource(megatron(tmp_path))):
        for start, stop in ((0, 8), (-1, 1), (3, 2)):
            with pytest.raises(IndexError):
                source.read(start, stop)
            with pytest.raises(IndexError):
                source.ends(start, stop)


def test_file_cut_after_opening_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    source = NanosetSource(nanoset(tmp_path))
    os.truncate(source.path, 6)
    with pytest.raises(CorpusSizeError, match="when it was opened"):
        source.read(0, 1)


def test_opening_a_trillion_tokens_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] not in (resource.RLIM_INFINITY,):
        pytest.skip("files may not be as large here")
    count, documents = 10**12, 10**9
    with open(tmp_path / "x.ds", "wb") as file:
        file.truncate(count * 2)
    with open(tmp_path / "x.ds.index", "wb") as file:
        file.truncate(documents * 8 - 8)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<Q", count))
    code = """
import sys, time, resource
import numpy
from kenotron.data.corpus import open_corpus
def resident():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before, started = resident(), time.perf_counter()
source = open_corpus(sys.argv[1], vocab_size=1000)
source.read(10**12 - 4, 10**12), source.read(2**32, 2**32 + 9), source.document_of(10**12 - 1)
print(time.perf_counter() - started, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, num_bytes = map(float, done.stdout.split())
    assert seconds < 1
    assert num_bytes < 50e6
