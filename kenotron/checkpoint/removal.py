"""What retention may remove. The names that it goes by come from callbacks, and theirs may come from a file of anybody's.

Only what lies directly in a folder to which this process has saved, and is a published checkpoint, a file of Lightning's or a
link to a checkpoint.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

from kenotron.checkpoint.errors import NotACheckpointError
from kenotron.checkpoint.format import unpublished
from kenotron.checkpoint.manifest import check_torch_file, is_checkpoint
from kenotron.durable import fsync_directory

#: How Lightning names its files.
_FILE_SUFFIX = ".ckpt"


class NotRemovedError(OSError):
    """Something was to be removed that is no checkpoint of this run's."""


def check_place(path: Path, folders: Collection[Path]) -> None:
    """Raise ``NotRemovedError`` unless ``path`` lies directly in one of ``folders``, whatever ``..`` and links say."""
    if path.parent.resolve() not in folders:
        raise NotRemovedError(f"{path} is left alone: this run has saved nothing in {path.parent.resolve()}")


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint in one step: a crash leaves none that is half there.

    Raises:
        NotRemovedError: it is something else.
    """
    if path.is_symlink():
        if path.exists() and not is_checkpoint(path) and not _is_torch_file(path):
            raise NotRemovedError(f"{path} is left alone: it is a link, and not to a checkpoint")
        path.unlink()
        return
    if not path.exists():
        return
    if path.is_file() and _is_torch_file(path):
        path.unlink()
        return
    if not is_checkpoint(path):
        raise NotRemovedError(f"{path} is left alone: it is no checkpoint")
    aside = unpublished(path, uuid.uuid4().hex, "removed")
    os.rename(path, aside)
    fsync_directory(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _is_torch_file(path: Path) -> bool:
    if path.suffix != _FILE_SUFFIX or not path.is_file():
        return False
    try:
        check_torch_file(path)
    except NotACheckpointError:
        return False
    return True
