"""The native engine: bytes, files and threads in C++20. It knows neither torch nor Lightning."""

from kenotron.callbacks_native._engine import (
    Engine,
    PieceToRead,
    ReadError,
    ReadResult,
    Snapshot,
    crc32c,
    read_pieces,
    version,
)

__all__ = ["Engine", "PieceToRead", "ReadError", "ReadResult", "Snapshot", "crc32c", "read_pieces", "version"]
