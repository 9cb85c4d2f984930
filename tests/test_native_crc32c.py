"""`kenotron.callbacks_native.crc32c` from Python: buffers, seeds, threads. The arithmetic itself is tested in C++."""

import mmap
import random
import sys
import threading
from array import array
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
import pytest

from kenotron.callbacks_native import crc32c, version


def test_known_vectors():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_every_contiguous_buffer_gives_the_checksum_of_its_bytes(tmp_path: Path):
    values = array("d", range(1000))
    raw = values.tobytes()
    path = tmp_path / "values"
    path.write_bytes(raw)
    read_only = np.frombuffer(raw)

    expected = crc32c(raw)
    assert crc32c(values) == expected
    assert crc32c(bytearray(raw)) == expected
    assert crc32c(memoryview(raw)) == expected
    assert crc32c(read_only) == expected
    assert crc32c(read_only.reshape(10, 100)) == expected
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert crc32c(mapped) == expected


def test_chained_pieces_equal_the_whole():
    data = random.Random(0).randbytes(100_003)
    for cut in (0, 1, 8, 767, 4096, 50_001, len(data)):
        assert crc32c(memoryview(data)[cut:], seed=crc32c(memoryview(data)[:cut])) == crc32c(data)


@pytest.mark.parametrize("strided", [memoryview(bytes(16))[::2], np.zeros((4, 4))[:, :2], np.zeros((4, 4)).T[:, :2]])
def test_a_strided_buffer_is_refused(strided):
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        crc32c(strided)


@pytest.mark.parametrize("no_buffer", ["text", 7, None])
def test_an_object_without_a_buffer_is_refused(no_buffer):
    with pytest.raises(TypeError):
        crc32c(no_buffer)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_that_is_no_checksum_is_refused(seed):
    with pytest.raises(TypeError):
        crc32c(b"", seed=seed)


def test_a_buffer_is_let_go_afterwards():
    buffer = bytearray(b"123456789")
    crc32c(buffer)
    buffer.append(0)  # raises BufferError while anyone holds a view


def test_other_threads_run_meanwhile():
    data = bytes(16 << 20)
    limit = 200
    rounds = 0
    stop = threading.Event()

    def checksum_until_stopped():
        nonlocal rounds
        while rounds < limit and not stop.is_set():
            crc32c(data)
            rounds += 1

    thread = threading.Thread(target=checksum_until_stopped)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # from here on a thread runs only when another gives up the GIL of its own accord
    try:
        thread.start()
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert rounds < limit


def test_the_engine_was_built_from_the_installed_version():
    assert version() == installed_version("kenotron")
