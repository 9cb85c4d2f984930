from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kenotron import durable
from kenotron.callbacks_native import crc32c
from kenotron.checkpoint import SyncShardWriter
from kenotron.checkpoint.format import CHUNK_BYTES


def test_the_file_is_header_and_buffers_and_each_chunk_of_each_buffer_has_its_checksum(tmp_path: Path) -> None:
    buffers = [os.urandom(CHUNK_BYTES + 5), b"abc"]
    size = 2 + sum(map(len, buffers))
    checksums = SyncShardWriter().write(tmp_path / "x", b"he", map(memoryview, buffers), num_bytes=size)
    assert (tmp_path / "x").read_bytes() == b"he" + b"".join(buffers)
    assert checksums == [[crc32c(buffers[0][:CHUNK_BYTES]), crc32c(buffers[0][CHUNK_BYTES:])], [crc32c(b"abc")]]


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        SyncShardWriter().write(tmp_path / "x", b"he", [], num_bytes=2)
    assert (tmp_path / "x").read_bytes() == b"old"


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("kenotron.checkpoint.writer.os.write", lambda fd, data: write(fd, data[:7]))
    data = os.urandom(100)
    SyncShardWriter().write(tmp_path / "x", b"he", [memoryview(data)], num_bytes=102)
    assert (tmp_path / "x").read_bytes() == b"he" + data


def test_reserve_passes_over_file_systems_that_cannot_and_tells_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "x", "wb") as file:
        for code, fails in ((errno.EOPNOTSUPP, False), (errno.ENOSPC, True)):
            monkeypatch.setattr(durable.ctypes, "get_errno", lambda code=code: code)
            if fails:
                with pytest.raises(OSError, match="No space left on device"):
                    durable.reserve(file.fileno(), -1, tmp_path / "x")
            else:
                durable.reserve(file.fileno(), -1, tmp_path / "x")


def test_write_durably_leaves_no_temporary_file(tmp_path: Path) -> None:
    durable.write_durably(tmp_path / "x", b"data")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_put_in_place_keeps_the_old_one_under_the_name_that_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, path, aside = (tmp_path / name for name in ("new", "path", "aside"))
    new.write_text("1")
    assert durable.put_in_place(new, path, aside) is None
    new.write_text("2")
    assert durable.put_in_place(new, path, aside) == new
    assert (path.read_text(), new.read_text()) == ("2", "1")
    monkeypatch.setattr(durable, "_exchange", lambda a, b: False)
    assert durable.put_in_place(new, path, aside) == aside
    assert (path.read_text(), aside.read_text()) == ("1", "2")
