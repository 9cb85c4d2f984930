"""Hugging Face model directories: read by byte ranges, written as a stream, published by one rename."""

from kenotron.hf.consolidate import consolidate
from kenotron.hf.convert import hf_to_kenotron, kenotron_to_nanotron, nanotron_to_kenotron
from kenotron.hf.directory import HFDirectory, HFTensor
from kenotron.hf.errors import (
    HFDirectoryError,
    ModelIncompleteError,
    ModelMismatchError,
    NotAModelDirectoryError,
    ShardMalformedError,
    ShardMissingError,
    ShardTruncatedError,
    WeightIndexError,
)
from kenotron.hf.export import export
from kenotron.hf.generate import generate
from kenotron.hf.load import from_hf
from kenotron.hf.restore import from_checkpoint
from kenotron.hf.writer import HFWriter

__all__ = [
    "HFDirectory",
    "HFDirectoryError",
    "HFTensor",
    "HFWriter",
    "ModelIncompleteError",
    "ModelMismatchError",
    "NotAModelDirectoryError",
    "ShardMalformedError",
    "ShardMissingError",
    "ShardTruncatedError",
    "WeightIndexError",
    "consolidate",
    "export",
    "from_checkpoint",
    "from_hf",
    "generate",
    "hf_to_kenotron",
    "kenotron_to_nanotron",
    "nanotron_to_kenotron",
]
