"""What can be wrong with a checkpoint: one class for each violation, all of them ``CheckpointError``."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Base of everything that can be wrong with a checkpoint on disk or while it is written."""


class SaveFailedError(CheckpointError):
    """A save did not come to an end; every rank of it raises this with the same text."""


class CoverageError(SaveFailedError):
    """The ranks' pieces leave a hole in a global tensor, overlap, or disagree about its shape or dtype."""


class RanksMissingError(SaveFailedError):
    """Some ranks did not begin, or did not finish, their part of a save in time."""


class NotACheckpointError(CheckpointError):
    """Nothing that looks like a checkpoint stands at the path."""


class NotPublishedError(CheckpointError):
    """A save to the path was begun and never published."""


class VersionTooNewError(CheckpointError):
    """The checkpoint was written in a later version of the format than this code reads."""


class ManifestDamagedError(CheckpointError):
    """The manifest fails its checksum or contradicts itself."""


class UnsafeFileNameError(ManifestDamagedError):
    """The manifest names a file that is not directly inside the checkpoint's directory."""


class FileMissingError(CheckpointError):
    """A file that the manifest lists is not there."""


class FileSizeError(CheckpointError):
    """A file has more or fewer bytes than the manifest says."""


class ChecksumError(CheckpointError):
    """Bytes that were read do not have the checksum which the manifest holds for them."""


class PickleRefusedError(CheckpointError):
    """A value is stored as a pickle, which can run code, and ``allow_pickle`` was not given."""


class UnpicklingError(CheckpointError):
    """A pickle is intact and fails to load, as when its class has moved."""


class OnOtherNodeError(CheckpointError):
    """What was asked for lies on another node, whose file system is not this one's."""


class RankStateMissingError(CheckpointError):
    """The state of a rank was asked for that did not take part in the save."""


class MismatchError(CheckpointError):
    """What was asked for differs from what is stored. The text lists all differences, ``problems`` holds them.

    When all differences are of one kind, the class raised is the one of that kind.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class TensorMissingError(MismatchError):
    """A tensor that was asked for is not in the checkpoint."""


class ShapeMismatchError(MismatchError):
    """A tensor is stored with another global shape."""


class DtypeMismatchError(MismatchError):
    """A tensor is stored with another dtype, and ``cast`` was not given."""
