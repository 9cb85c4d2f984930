"""Sharded checkpoints: saved on any layout, published by one rename, checked byte for byte, loaded on any layout."""

from kenotron.checkpoint.asynchronous import Checkpointer, PendingSave, wait_for
from kenotron.checkpoint.claim import FolderClaim
from kenotron.checkpoint.engine import EngineSettings
from kenotron.checkpoint.errors import (
    CheckpointError,
    ChecksumError,
    CoverageError,
    DtypeMismatchError,
    FileMissingError,
    FileSizeError,
    ManifestDamagedError,
    MismatchError,
    NotACheckpointError,
    NotPublishedError,
    OnOtherNodeError,
    PickleRefusedError,
    RanksMissingError,
    RankStateMissingError,
    SaveFailedError,
    ShapeMismatchError,
    TensorMissingError,
    UnpicklingError,
    UnsafeFileNameError,
    VersionTooNewError,
)
from kenotron.checkpoint.format import LocalTensor, Piece
from kenotron.checkpoint.load import load_into, load_rank_state, load_state, load_state_dict
from kenotron.checkpoint.manifest import (
    Manifest,
    NodePart,
    StoredPiece,
    StoredTensor,
    check_torch_file,
    is_checkpoint,
    read_manifest,
)
from kenotron.checkpoint.meeting import remove_leftovers
from kenotron.checkpoint.merge import merge
from kenotron.checkpoint.nodes import Nodes, check_sharing, common_path, recover
from kenotron.checkpoint.opening import is_trusted, open_checkpoint, what_was_left_out
from kenotron.checkpoint.save import save
from kenotron.checkpoint.verify import Damage, FileReport, VerifyReport, verify
from kenotron.checkpoint.writer import ShardWriter, SyncShardWriter

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "ChecksumError",
    "CoverageError",
    "Damage",
    "DtypeMismatchError",
    "EngineSettings",
    "FileMissingError",
    "FileReport",
    "FileSizeError",
    "FolderClaim",
    "LocalTensor",
    "Manifest",
    "ManifestDamagedError",
    "MismatchError",
    "NodePart",
    "Nodes",
    "NotACheckpointError",
    "NotPublishedError",
    "OnOtherNodeError",
    "PendingSave",
    "PickleRefusedError",
    "Piece",
    "RankStateMissingError",
    "RanksMissingError",
    "SaveFailedError",
    "ShapeMismatchError",
    "ShardWriter",
    "StoredPiece",
    "StoredTensor",
    "SyncShardWriter",
    "TensorMissingError",
    "UnpicklingError",
    "UnsafeFileNameError",
    "VerifyReport",
    "VersionTooNewError",
    "check_sharing",
    "check_torch_file",
    "common_path",
    "is_checkpoint",
    "is_trusted",
    "load_into",
    "load_rank_state",
    "load_state",
    "load_state_dict",
    "merge",
    "open_checkpoint",
    "read_manifest",
    "recover",
    "remove_leftovers",
    "save",
    "verify",
    "wait_for",
    "what_was_left_out",
]
