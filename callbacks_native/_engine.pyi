import os
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import Buffer

def crc32c(buffer: Buffer, seed: int = 0) -> int:
    """Return the CRC-32C of a contiguous buffer, continuing from `seed`, the CRC-32C of what precedes it."""

def version() -> str:
    """Return the version of Kénotron that this was built from."""

class Engine:
    """Copies snapshots of memory into a bounded pool and writes them to files (`engine.hpp`)."""

    def __init__(
        self,
        *,
        pool_bytes: int,
        slot_bytes: int,
        num_copiers: int,
        num_writers: int,
        niceness: int,
        cpus: Sequence[int],
        max_bytes_per_second: float,
        direct: bool,
        checked_share: float,
        cuda_library: str = "libcuda.so.1",
    ) -> None: ...
    def prepare(self, num_bytes: int) -> None:
        """Claim memory for a snapshot of so many bytes, in the background."""

    def submit(
        self,
        header: bytes,
        sources: Sequence[tuple[int, list[tuple[int, int]], int, bool, int, int, bool]],
        keep: Any,
        head_start_s: float = 0.0,
        other: Snapshot | None = None,
    ) -> Snapshot:
        """Begin to copy `sources` (see `sources.py`). `keep` is held.

        Args:
            head_start_s: begin so much later, unless a source is eager; who waits does not.
            other: may hold the same. If its fingerprints say so, sources are compared with its copy and not copied.

        Raises:
            OSError: the CUDA driver cannot be opened, or failed.
        """

    def fence(self, within_s: float | None = None) -> bool:
        """Return True when all snapshots have been copied, or have failed; False when the time is up first."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_free_slots(self) -> int: ...
    @property
    def num_claimed_slots(self) -> int: ...
    @property
    def is_locked(self) -> bool: ...

class Snapshot:
    """One file on its way. Letting go of it gives up what has not happened yet."""

    def attach(self, path: str) -> None:
        """Create the file, which must not exist, at its full size, and begin to write; `OSError`."""

    def wait_eager(self) -> None:
        """Return when the eager sources have been copied, or it has failed; with many of them this waits for `attach`."""

    def wait_staged(self) -> None:
        """Return when all has been copied, or it has failed."""

    def finish(self) -> None:
        """Return when the file is complete, durable and closed; `OSError`."""

    def sums(self) -> list[list[int]]:
        """Return for each source the CRC-32C of each 4 MiB of it; after `finish`."""

    def changed(self) -> list[int]:
        """Return which sources were not copied as they were at `submit`, or differ from those of the other snapshot."""

    def stats(self) -> dict[str, float]: ...
    def cancel(self) -> None: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def is_staged(self) -> bool: ...
    @property
    def is_like_other(self) -> bool: ...

class PieceToRead:
    """A row-major array in a file, and the boxes that are wanted of it; without any, all of it is checked.

    Args:
        file: index among the files.
        begin: its first byte in the file.
        num_bytes: how many it has.
        checksums: the CRC-32C of each chunk, counted from `begin`; the last one may be shorter.
        item_bytes: the size of an element.
        shape: its extents.
        shared: other processes want it at this time, too; it is read through the page cache, from the disk once.
    """

    def __init__(
        self,
        *,
        file: int,
        begin: int,
        num_bytes: int,
        checksums: Sequence[int],
        item_bytes: int,
        shape: Sequence[int],
        shared: bool = False,
    ) -> None: ...
    def add_target(self, *, offset: Sequence[int], shape: Sequence[int], address: int, strides: Sequence[int]) -> None:
        """Ask for a box of it.

        Args:
            offset: where the box begins in the piece. shape: its extents.
            address: where its first element goes. Memory that stays valid until it was read, and that no other box shares.
            strides: the distances at the destination, in bytes, of any sign.
        """

class ReadError:
    """What was wrong, and where."""

    @property
    def kind(self) -> Literal["io", "cut", "checksum"]:
        """`io`: the system refused, with `code`. `cut`: the file ends too early. `checksum`: a chunk is not what it was."""

    @property
    def code(self) -> int:
        """The errno, 0 unless `io`."""

    @property
    def path(self) -> str:
        """The file, empty where there was no memory to begin with any."""

    @property
    def piece(self) -> int:
        """The index of the piece, of several that were read at once the first one's."""

    @property
    def offset(self) -> int:
        """Where in the file: the chunk, what could not be read, or the end of a file that was cut."""

    @property
    def length(self) -> int:
        """How many bytes from `offset` on could not be had."""

class ReadResult:
    """What reading came to."""

    @property
    def errors(self) -> list[ReadError]:
        """At most one, or all, in the order of the files."""

    @property
    def num_bytes(self) -> int:
        """How many bytes were read, what lay between the wanted ones included."""

    @property
    def cached_bytes(self) -> int:
        """How many of these were in the page cache."""

    @property
    def seconds(self) -> float:
        """How long it took."""

def read_pieces(
    files: Sequence[str | bytes | os.PathLike[str]],
    pieces: Sequence[PieceToRead],
    *,
    chunk_bytes: int,
    num_threads: int = 0,
    direct: bool = True,
    stop_at_first_error: bool = True,
) -> ReadResult:
    """Fill the destinations of all pieces, checking every chunk before a byte of it is used.

    Reads with several threads of its own, past the page cache where it does not hold the bytes and they are not shared, and
    lets other Python threads run. After an error some destinations are filled and others are not.

    Args:
        files: the paths.
        pieces: what to read of them, in any order. The caller keeps the destinations alive.
        chunk_bytes: how many bytes have one checksum.
        num_threads: 0 for as many as there are processors, but 2 to 4.
        direct: False reads through the page cache only.
        stop_at_first_error: False goes on and reports all errors.

    Raises:
        ValueError: a piece contradicts itself.
        KeyboardInterrupt: or what else a signal handler raises meanwhile.
    """
