from collections.abc import Sequence
from typing import Any

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
        self, header: bytes, sources: Sequence[tuple[int, list[tuple[int, int]], int, bool, int, int]], keep: Any
    ) -> Snapshot:
        """Begin to copy `sources` (see `sources.py`). `keep` is held.

        Raises:
            OSError: the CUDA driver cannot be opened, or failed.
        """

    def fence(self) -> float:
        """Return when all snapshots have been copied, or have failed; the seconds that this took."""

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

    def restage(self) -> None:
        """Copy all anew. The sources must not change meanwhile; waits for `attach`."""

    def finish(self) -> None:
        """Return when the file is complete, durable and closed; `OSError`."""

    def sums(self) -> list[list[int]]:
        """Return for each source the CRC-32C of each 4 MiB of it; after `finish`."""

    def stats(self) -> dict[str, float]: ...
    def cancel(self) -> None: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def is_staged(self) -> bool: ...
    @property
    def is_torn(self) -> bool: ...
