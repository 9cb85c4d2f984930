"""The native engine: bytes, files and threads in C++20. It knows neither torch nor Lightning."""

from kenotron.callbacks_native._engine import Engine, Snapshot, crc32c, version

__all__ = ["Engine", "Snapshot", "crc32c", "version"]
