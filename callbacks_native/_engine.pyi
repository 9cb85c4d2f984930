from typing_extensions import Buffer

def crc32c(buffer: Buffer, seed: int = 0) -> int:
    """Return the CRC-32C of a contiguous buffer, continuing from `seed`, the CRC-32C of what precedes it."""

def version() -> str:
    """Return the version of Kénotron that this was built from."""
