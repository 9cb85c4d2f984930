"""What can be wrong with a Hugging Face model directory: one class for each violation, all of them ``HFDirectoryError``."""

from __future__ import annotations

from collections.abc import Sequence


class HFDirectoryError(ValueError):
    """A model directory is not what it should be. The text lists everything that is wrong, ``problems`` holds it.

    When all problems are of one kind, the class raised is the one of that kind.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


class NotAModelDirectoryError(HFDirectoryError):
    """There is no directory, or nothing in it that tells what the model is."""


class WeightIndexError(HFDirectoryError):
    """The index is malformed, or it and the files disagree about which of them has a tensor."""


class ShardMissingError(HFDirectoryError):
    """The index names a file that is not there."""


class ShardTruncatedError(HFDirectoryError):
    """A file is shorter than its header says."""


class ShardMalformedError(HFDirectoryError):
    """A file is not in the safetensors format."""


class ModelIncompleteError(HFDirectoryError):
    """Writing came to its end, and not every element of every tensor was written exactly once."""


class ModelMismatchError(HFDirectoryError):
    """Tensors are missing, left over, or of another shape than the model's configuration says."""


def raise_all(title: str, errors: Sequence[HFDirectoryError]) -> None:
    """Raise all of them as one error, if there are any."""
    if not errors:
        return
    problems = tuple(problem for error in errors for problem in error.problems)
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else HFDirectoryError
    raise kind("\n".join([title, *problems]), problems)
