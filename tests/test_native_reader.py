"""`kenotron.callbacks_native.read_pieces` from Python: arguments, errors, threads, signals. Reading is tested in C++."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kenotron.callbacks_native import PieceToRead, crc32c, read_pieces

DATA = random.Random(0).randbytes(10_000)
CHUNK = 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def piece(begin: int = 0, num_bytes: int = 10_000, file: int = 0) -> PieceToRead:
    chunks = [DATA[at : min(at + CHUNK, begin + num_bytes)] for at in range(begin, begin + num_bytes, CHUNK)]
    return PieceToRead(
        file=file, begin=begin, num_bytes=num_bytes, checksums=[*map(crc32c, chunks)], item_bytes=1, shape=(num_bytes,)
    )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("as_name", [os.fspath, os.fsencode, Path])
def test_a_box_arrives_with_the_strides_of_its_destination(
    file: Path, as_name: Callable[[Path], str | bytes | Path], direct: bool
) -> None:
    into = np.zeros((30, 3), dtype=np.uint8)
    wanted = piece(5, 300)
    wanted.add_target(offset=(10,), shape=(30,), address=into[:, 1].ctypes.data, strides=(3,))
    result = read_pieces([as_name(file)], [wanted], chunk_bytes=CHUNK, direct=direct, num_threads=2)
    assert (result.errors, result.num_bytes) == ([], 300)
    assert into[:, 1].tobytes() == DATA[15:45]
    assert not into[:, ::2].any()


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(name).write_bytes(DATA[:-1])
    (error,) = read_pieces([name], [piece()], chunk_bytes=CHUNK).errors
    assert (error.kind, error.path, error.offset, error.length) == ("cut", name, 9_999, 1)


def test_errors_tell_their_kind_and_place(file: Path, tmp_path: Path) -> None:
    damaged = bytearray(DATA)
    damaged[2500] ^= 1
    damaged[9999] ^= 1
    file.write_bytes(damaged)
    pieces = [piece(0, 2000), piece(2000, 8000), piece(0, 100, file=1)]
    files = [file, tmp_path / "nowhere"]
    found = read_pieces(files, pieces, chunk_bytes=CHUNK, stop_at_first_error=False).errors
    assert [(error.kind, error.piece, error.path, error.offset, error.length) for error in found] == [
        ("checksum", 1, str(file), 2000, 1000),
        ("checksum", 1, str(file), 9000, 1000),
        ("io", 2, str(tmp_path / "nowhere"), 0, 100),
    ]
    assert [os.strerror(error.code) for error in found] == ["Success", "Success", "No such file or directory"]
    assert len(read_pieces(files, pieces, chunk_bytes=CHUNK).errors) == 1


@pytest.mark.parametrize(
    "change", [{"file": 1}, {"num_bytes": 9_999}, {"checksums": [0]}, {"item_bytes": 0}, {"shape": (-1,)}, {"begin": 2**63}]
)
def test_pieces_that_contradict_themselves_are_refused(file: Path, change: dict[str, int]) -> None:
    good = {"file": 0, "begin": 0, "num_bytes": 10_000, "checksums": [0] * 10, "item_bytes": 1, "shape": (10_000,)}
    with pytest.raises(ValueError, match="piece 1: "):
        read_pieces([file], [piece(), PieceToRead(**(good | change))], chunk_bytes=CHUNK)


@pytest.mark.parametrize(
    "change", [{"offset": (1,)}, {"offset": (0, 0)}, {"shape": (-1,)}, {"strides": ()}, {"address": 0}, {"offset": (-1,)}]
)
def test_boxes_outside_of_their_piece_are_refused(file: Path, change: dict[str, int]) -> None:
    wanted = piece()
    wanted.add_target(**({"offset": (0,), "shape": (10_000,), "address": 4096, "strides": (1,)} | change))
    with pytest.raises(ValueError, match="piece 0: a target"):
        read_pieces([file], [wanted], chunk_bytes=CHUNK)


def test_arguments_of_another_type_are_refused(file: Path) -> None:
    with pytest.raises(TypeError):
        read_pieces([7], [], chunk_bytes=CHUNK)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        read_pieces([file], [None], chunk_bytes=CHUNK)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="chunk_bytes must be positive"):
        read_pieces([file], [], chunk_bytes=0)


def test_other_threads_run_meanwhile(file: Path) -> None:
    pieces = [piece() for _ in range(2000)]
    limit = 50
    rounds = 0
    stop = threading.Event()

    def read_until_stopped() -> None:
        nonlocal rounds
        while rounds < limit and not stop.is_set():
            read_pieces([file], pieces, chunk_bytes=CHUNK)
            rounds += 1

    thread = threading.Thread(target=read_until_stopped)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # from here on a thread runs only when another gives up the GIL of its own accord
    try:
        thread.start()
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert rounds < limit


def test_a_signal_ends_it(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 64 << 30)  # all of it a hole: many seconds of zeros
    chunk = 4 << 20
    checksums = [crc32c(bytes(chunk))] * ((64 << 30) // chunk)
    wanted = PieceToRead(file=0, begin=0, num_bytes=64 << 30, checksums=checksums, item_bytes=1, shape=(64 << 30,))
    former = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(Interrupted):
            read_pieces([large], [wanted], chunk_bytes=chunk)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - started < 3
