"""The native engine: bytes, files and threads in C++20. It knows neither torch nor Lightning."""

from kenotron.callbacks_native._engine import crc32c, version

__all__ = ["crc32c", "version"]
