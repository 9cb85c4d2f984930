"""What is a document and what is not, in every format, in-process and on memory:// as on any file system of fsspec."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kenotron.data.tokenize.documents import Document, PieceReader, Problem, lines_before
from kenotron.data.tokenize.inputs import Piece, cut, digest_of, find_inputs, shard_bytes_of

OUT = Path("/nowhere/out")


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def read(memory: fsspec.AbstractFileSystem, name: str, content: bytes, shard_bytes: int = 1 << 30) -> list[Document | Problem]:
    """Read a file piece by piece, with lines counted from its begin."""
    memory.pipe_file(f"/{name}", content)
    found: list[Document | Problem] = []
    lines = 0
    for shard in cut(find_inputs(f"memory://{name}", OUT), shard_bytes):
        for piece in shard:
            reader = PieceReader(piece, "text")
            found += [item._replace(line=item.line and item.line + lines) for item in reader]
            assert reader.position == piece.stop - piece.start
            assert not reader.lines or lines_before(piece) == lines
            lines += reader.lines
    return found


def jsonl(*values: object) -> bytes:
    return b"".join(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values)


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_jsonl_has_a_document_a_line_whatever_ends_it(memory: fsspec.AbstractFileSystem) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"other": 1, "text": "\\u00fc"}\n{"text": "last"}'
    assert read(memory, "x.jsonl", content) == [Document("a", 1, 0), Document("ü", 4, 23), Document("last", 5, 54)]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"text": "a\xff"}', "invalid UTF-8", "0xff"),
        (b'{"text": "a"', "broken JSON", "column"),
        (b'["a"]', "broken JSON", "list"),
        (b"null", "broken JSON", "NoneType"),
        (b"[" * 200_000, "broken JSON", ""),
        (b"9" * 5000, "broken JSON", "digits"),
        (b'{"txt": "a", "id": 1}', "missing column", "no 'text' among 'txt', 'id'"),
        (b"{}", "missing column", "no columns"),
        (b'{"text": 1}', "not a string", "int"),
        (b'{"text": null}', "not a string", "null"),
        (b'{"text": ["a"]}', "not a string", "list"),
        (b'{"text": ""}', "empty", ""),
        (b'{"text": "\\ud800"}', "invalid UTF-8", "surrogate"),
        (b"\x00{\x00}\x00", "broken JSON", ""),
    ],
)
def test_line_that_is_no_document_is_told_with_its_place(
    memory: fsspec.AbstractFileSystem, line: bytes, kind: str, message: str
) -> None:
    first, problem, last = read(memory, "x.jsonl", jsonl({"text": "a"}, line + b"\n", {"text": "b"}))
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.line) == (kind, 2)
    assert message in problem.message
    assert problem.offset == 14 + (line.index(b"\xff") if b"\xff" in line else 0)
    assert (first, last) == (Document("a", 1, 0), Document("b", 3, 14 + len(line) + 1))


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"", b"x", b'{"text": "a"}', b'{"text": "' + b"b" * 30 + b'"}', b"\xff"]), max_size=12),
    ends=st.booleans(),
    shard_bytes=st.integers(1, 60),
)
def test_cutting_a_file_anywhere_loses_and_repeats_nothing(lines: list[bytes], ends: bool, shard_bytes: int) -> None:
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    memory = fsspec.filesystem("memory")
    assert read(memory, "cut.jsonl", content, shard_bytes) == read(memory, "cut.jsonl", content)


# ---- Compressed -----------------------------------------------------------------------------------------------------


def compressed(name: str, content: bytes) -> bytes:
    return gzip.compress(content) if name.endswith(".gz") else zstandard.compress(content)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz"])
def test_compressed_lines_are_read_over_members_and_blocks(memory: fsspec.AbstractFileSystem, name: str) -> None:
    texts = [{"text": f"{number} " * 20_000} for number in range(40)]
    content = compressed(name, jsonl(*texts[:25])) + compressed(name, jsonl(*texts[25:]))
    content += b"\0" * 512 if name.endswith(".gz") else b""  # tape archives pad
    assert [item.text for item in read(memory, name, content)] == [text["text"] for text in texts]  # type: ignore[union-attr]
    assert [item.text for item in read(memory, name, content, 100)] == [text["text"] for text in texts]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_compressed_file_that_is_cut_off_or_damaged_gives_what_comes_before(
    memory: fsspec.AbstractFileSystem, name: str
) -> None:
    whole = compressed(name, jsonl({"text": "a"}))
    cut_off = whole + compressed(name, jsonl(*({"text": f"{number * 7919}"} for number in range(50_000))))[:-1000]
    *documents, problem = read(memory, name, cut_off)
    assert documents[0] == Document("a", 1, 0)
    assert isinstance(problem, Problem)
    assert (problem.kind, "cut off" in problem.message) == ("unreadable", True)
    *_, problem = read(memory, name, whole + b"no magic number at all")
    assert isinstance(problem, Problem)
    assert (problem.kind, "damaged" in problem.message) == ("unreadable", True)


# ---- Plain text -----------------------------------------------------------------------------------------------------


def test_plain_text_is_a_document_a_file(memory: fsspec.AbstractFileSystem) -> None:
    assert read(memory, "x.txt", b"\xef\xbb\xbftwo\r\nlines\n") == [Document("two\r\nlines\n", 1, 0)]
    assert read(memory, "x.md.gz", gzip.compress(b"packed")) == [Document("packed", 1, 0)]
    (problem,) = read(memory, "x.py", b"one\ntwo\xff")
    assert (problem.line, problem.offset) == (2, 7)
    (problem,) = read(memory, "empty.txt", b"")
    assert isinstance(problem, Problem)
    assert problem.kind == "empty"


def test_empty_files_of_lines_hold_no_documents_and_no_problems(memory: fsspec.AbstractFileSystem) -> None:
    assert read(memory, "x.jsonl", b"") == []
    assert read(memory, "x.jsonl", b"\n\n", 1) == []


# ---- Parquet --------------------------------------------------------------------------------------------------------


def parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 50])
def test_parquet_is_read_by_row_groups(memory: fsspec.AbstractFileSystem, kind: pa.DataType, shard_bytes: int) -> None:
    texts = [f"text {number % 5}" for number in range(23)]
    content = parquet(pa.table({"id": list(range(23)), "text": pa.array(texts).cast(kind)}), row_group_size=4)
    assert read(memory, "x.parquet", content, shard_bytes) == [Document(text, row, -1) for row, text in enumerate(texts, 1)]


def test_rows_that_are_no_documents_are_told_by_number(memory: fsspec.AbstractFileSystem) -> None:
    texts = pa.array([b"a", None, b"", b"\xff", b"b"]).cast(pa.binary())
    invalid = pa.StringArray.from_buffers(5, texts.buffers()[1], texts.buffers()[2], texts.buffers()[0])
    found = read(memory, "x.parquet", parquet(pa.table({"text": invalid}), row_group_size=2), 40)
    kinds = [(item.line, item.kind) for item in found if isinstance(item, Problem)]
    assert kinds == [(2, "not a string"), (3, "empty"), (4, "invalid UTF-8")]
    assert [item.text for item in found if isinstance(item, Document)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (parquet(pa.table({"txt": ["a"] * 100}), row_group_size=10), "missing column"),
        (parquet(pa.table({"text": [1] * 100}), row_group_size=10), "not a string"),
        (b"PAR1 and nothing else", "unreadable"),
        (b"", "unreadable"),
        (b"x" * 300, "unreadable"),
        (parquet(pa.table({"text": ["a"] * 100}))[:-30], "unreadable"),
    ],
)
def test_parquet_file_that_can_not_be_used_is_told_once(memory: fsspec.AbstractFileSystem, content: bytes, kind: str) -> None:
    (problem,) = read(memory, "x.parquet", content, 50)
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.line) == (kind, None)


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def test_folders_globs_and_urls_stand_for_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.txt", "a/.hidden.txt", ".git/x.txt", "out/00000.ds", "c.parquet.d/x.PARQUET"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")

    def names(*inputs: str) -> list[str]:
        return [Path(file.name).relative_to(tmp_path).as_posix() for file in find_inputs(inputs, tmp_path / "out")]

    assert names(str(tmp_path)) == ["a/z.txt", "b.jsonl", "c.parquet.d/x.PARQUET"]
    assert names(f"file://{tmp_path}") == ["a/z.txt", "b.jsonl", "c.parquet.d/x.PARQUET"]
    assert names(str(tmp_path / "*.jsonl"), str(tmp_path / "a")) == ["b.jsonl", "a/z.txt"]
    assert names(str(tmp_path / "**" / "*.txt")) == ["a/z.txt"]
    assert names(str(tmp_path / "a" / ".*.txt")) == ["a/.hidden.txt"]
    kinds = [(file.kind, file.compression) for file in find_inputs(str(tmp_path), tmp_path / "out")]
    assert kinds == [("text", ""), ("jsonl", ""), ("parquet", "")]


def test_inputs_that_stand_for_nothing_or_for_the_same_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for inputs, match in (
        ([], "no input"),
        ([tmp_path / "b.txt"], "no such"),
        ([tmp_path / "*.json"], "nothing matches"),
        ([tmp_path / "empty"], "no file"),
        ([tmp_path, tmp_path / "a.txt"], "named twice"),
        ([OUT.parent, OUT], "no such"),
        ([tmp_path / "x.parquet.gz"], "compressed within"),
    ):
        (tmp_path / "x.parquet.gz").touch() if "compressed" in match else None
        with pytest.raises(ValueError, match=match):
            find_inputs(inputs, OUT)
    with pytest.raises(ValueError, match="where the tokens go"):
        find_inputs(tmp_path, tmp_path)


def test_shards_depend_on_sizes_alone_and_hold_every_byte_once(tmp_path: Path) -> None:
    for number, size in enumerate((0, 5, 100, 7)):
        (tmp_path / f"{number}.jsonl").write_bytes(b"x" * size)
        (tmp_path / f"{number}.txt").write_bytes(b"x" * size)
    files = find_inputs(tmp_path, OUT)
    shards = cut(files, 30)
    sizes = [sum(piece.stop - piece.start for piece in shard) for shard in shards]
    assert max(sizes) <= 130  # a text of 100 bytes can't be cut
    pieces = [piece for shard in shards for piece in shard]
    for file in files:
        own = [piece for piece in pieces if piece.file == file]
        assert [own[0].start, *(piece.stop for piece in own)] == [*(piece.start for piece in own), file.size]
    assert [piece.file.name for piece in pieces] == sorted(piece.file.name for piece in pieces)
    assert shard_bytes_of(files) == 4 << 20
    assert shards == cut(find_inputs(tmp_path, OUT), 30)


def test_digest_of_inputs_changes_when_one_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    before = digest_of(find_inputs(tmp_path, OUT))
    assert digest_of(find_inputs(tmp_path, OUT)) == before
    (tmp_path / "a.txt").write_text("xy")
    assert digest_of(find_inputs(tmp_path, OUT)) != before


def test_piece_within_one_endless_line_is_left_soon(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/x.jsonl", b"x" * 5_000_000)
    (file,) = find_inputs("memory://x.jsonl", OUT)
    reader = PieceReader(Piece(file=file, start=1000, stop=2000), "text")
    assert (list(reader), reader.lines) == ([], 0)
