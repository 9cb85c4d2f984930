"""Paths of checkpoints that Lightning's callbacks keep: made alike on all ranks, and not believed where a file names them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kenotron.checkpoint import Checkpointer, is_checkpoint
from kenotron.strategies import _lightning

_SINGLE = ("best_model_path", "kth_best_model_path", "last_model_path")
_RANKED = "best_k_models"


def paths_of(callback: Any) -> dict[str, Any]:
    """Return the paths that a callback like ``ModelCheckpoint`` keeps, as JSON has them."""
    kept: dict[str, Any] = {name: str(path) for name in _SINGLE if (path := getattr(callback, name, None))}
    ranked = getattr(callback, _RANKED, None)
    if isinstance(ranked, Mapping):
        kept[_RANKED] = list(map(str, ranked))
    return kept


def reserve_names(callbacks: Iterable[Any], checkpointer: Checkpointer) -> None:
    """Let callbacks that look whether a name is free see what is under way as if it were done.

    ``ModelCheckpoint`` numbers names that are taken: a checkpoint that is being written has taken its own already.
    """
    for callback in callbacks:
        _lightning.replace_filesystem(callback, lambda real: _ExpectedFiles(real, checkpointer))


class _ExpectedFiles:
    """A file system on which what a checkpointer has begun is done."""

    def __init__(self, real: Any, checkpointer: Checkpointer) -> None:
        self._real, self._checkpointer = real, checkpointer

    def exists(self, path: Any, **kwargs: Any) -> bool:
        expected = self._checkpointer.will_stand_at(path)
        return bool(self._real.exists(path, **kwargs)) if expected is None else expected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __reduce__(self) -> Any:  # copies of a callback belong to no run
        return _itself, (self._real,)


def _itself(value: Any) -> Any:
    return value


def take_paths(callback: Any, theirs: Mapping[str, Any]) -> None:
    """Put another rank's paths in the place of a callback's own, which keeps its values."""
    own = paths_of(callback)
    for name in _SINGLE:
        if name in theirs and name in own:
            setattr(callback, name, theirs[name])
    ranked = getattr(callback, _RANKED, None)
    if ranked and len(theirs.get(_RANKED, ())) == len(ranked):
        callback.best_k_models = dict(zip(theirs[_RANKED], ranked.values(), strict=True))


def forget_foreign_paths(states: Mapping[str, Any], folders: Collection[str | os.PathLike[str]]) -> list[str]:
    """Take out of restored states of callbacks the paths that a stranger may have written into the file.

    What a callback keeps as its checkpoints it removes later, and ``ckpt_path="best"`` loads it.

    Args:
        states: of callbacks, from a checkpoint; changed in place.
        folders: whose content is believed: those that this run saves to, and the one that the checkpoint lies in.

    Returns:
        The paths that were taken out.
    """
    own = {Path(folder).resolve() for folder in folders}
    foreign: list[str] = []

    def is_foreign(path: Any) -> bool:
        if path in ("", None):
            return False
        if not _is_own(path, own):
            foreign.append(str(path))
            return True
        return False

    for state in states.values():
        if not isinstance(state, dict):
            continue
        ranked = state.get(_RANKED)
        if isinstance(ranked, dict) and any(_each(is_foreign, ranked)):
            state[_RANKED] = {path: value for path, value in ranked.items() if not is_foreign(path)}
            state.pop("kth_value", None)  # of what is gone; the callback's own is the worst that there is
            state["kth_best_model_path"] = ""
        for name in _SINGLE:
            if name in state and is_foreign(state[name]):
                state[name] = ""
    return list(dict.fromkeys(foreign))


def _each(is_foreign: Any, paths: Iterable[Any]) -> list[bool]:
    return [is_foreign(path) for path in paths]


def _is_own(path: Any, folders: Collection[Path]) -> bool:
    if not isinstance(path, str) or "://" in path:
        return False
    place = Path(os.path.abspath(path))
    if place.parent.resolve() not in folders:
        return False
    return not os.path.lexists(place) or place.is_symlink() or is_checkpoint(place) or place.suffix == ".ckpt"
