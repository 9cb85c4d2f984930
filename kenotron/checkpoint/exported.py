"""Checkpoints for loggers with ``log_model``: each as one file, as Lightning itself saves it, which opens anywhere.

Loggers look for files and know them by their paths. An `ExportedPath` is the file's path, and equal to that of the directory.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kenotron.checkpoint.asynchronous import wait_for
from kenotron.checkpoint.manifest import read_manifest
from kenotron.checkpoint.opening import open_checkpoint

_PATHS = ("last_model_path", "best_model_path")


class ExportedPath(str):
    """The path of a file that was made of a checkpoint; it counts as the checkpoint's."""

    directory: str

    def __new__(cls, file: str, directory: str) -> ExportedPath:
        made = super().__new__(cls, file)
        made.directory = directory
        return made

    def __eq__(self, other: object) -> bool:
        return self.directory == (other.directory if isinstance(other, ExportedPath) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.directory)


def scan(original: Callable[[Any, Any], Any], callback: Any, logged: Mapping[str, float]) -> Any:
    """Return what Lightning's own function finds, with directories in the form of files.

    Args:
        original: that function. callback: a ``ModelCheckpoint``, or a proxy of one. logged: when each was logged last.
    """
    names = [name for name in _PATHS if getattr(callback, name, None)]
    ranked = getattr(callback, "best_k_models", {})
    directories = {path for path in [*(getattr(callback, name) for name in names), *ranked] if wait_for(path)}
    if not directories:
        return original(callback, logged)
    seen = _plain(callback)
    files = {path: _export(path) for path in directories}
    for name in names:
        path = getattr(callback, name)
        setattr(seen, name, files.get(path, path))
    seen.best_k_models = {files.get(path, path): score for path, score in ranked.items()}
    return original(seen, logged)


class _Seen:
    """What a logger looks at of a callback."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _plain(callback: Any) -> Any:
    names = (*_PATHS, "best_k_models", "current_score", "best_model_score")
    return _Seen(**{name: getattr(callback, name) for name in names if hasattr(callback, name)})


def _export(path: str) -> ExportedPath:
    """Return a file that holds what ``torch.load`` returns of a checkpoint. Made anew where the checkpoint is another one."""
    folder = Path(_folder(), read_manifest(path).save_id)
    file = folder / os.path.basename(path)
    if not file.exists():
        folder.mkdir(exist_ok=True)
        torch.save(open_checkpoint(path), file)
        modified = os.stat(path).st_mtime
        os.utime(file, (modified, modified))
    return ExportedPath(str(file), str(path))


@functools.cache
def _folder() -> str:
    """Return a folder that is gone when the process ends."""
    made = tempfile.mkdtemp(prefix="kenotron-logged-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
