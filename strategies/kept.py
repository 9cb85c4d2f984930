"""What ``ModelCheckpoint`` believes, put right when a save that it took for done has failed.

It notes a checkpoint's name and score before it saves, and forgets the one whose place that takes. Saves end later here, and
what was to be replaced stays where one fails (``kenotron.checkpoint.retention``): it is then the callback's again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kenotron.checkpoint import Checkpointer, PendingSave


class _Known(NamedTuple):
    """What a callback believes: scores by path, the best path, the last one."""

    models: dict[str, Any]
    best: str
    last: str

    @classmethod
    def of(cls, callback: Any) -> _Known:
        models = getattr(callback, "best_k_models", {})
        return cls(dict(models), getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", ""))


@dataclass
class _Saved:
    """A save, and what each callback believed before it."""

    path: str
    before: dict[int, _Known]
    save: PendingSave | None = None

    def take_back(self, callback: Any) -> None:
        """Let a callback believe that this was never saved."""
        before = self.before.get(id(callback), _Known({}, "", ""))
        models = getattr(callback, "best_k_models", {})
        if self.path in models:
            del models[self.path]
            models |= before.models
            _rank_again(callback)
        elif getattr(callback, "best_model_path", None) == self.path:
            callback.best_model_path = before.best
        if getattr(callback, "last_model_path", None) == self.path:
            callback.last_model_path = before.last


class Beliefs:
    """Remembers what callbacks gave up for saves that are under way. All ranks do."""

    def __init__(self) -> None:
        self._under_way: list[_Saved] = []
        self._known: dict[int, _Known] = {}

    def note(self, callbacks: Iterable[Any]) -> None:
        """Note what callbacks believe now."""
        self._known = {id(callback): _Known.of(callback) for callback in callbacks}

    def begun(self, callbacks: Iterable[Any], save: PendingSave, path: Any) -> None:
        """A save was begun."""
        callbacks = list(callbacks)
        saved = self._since_note(callbacks, path)
        saved.save = save
        self._under_way.append(saved)
        self.note(callbacks)

    def not_begun(self, callbacks: Iterable[Any], path: Any) -> None:
        """A save was refused in the call."""
        callbacks = list(callbacks)
        saved = self._since_note(callbacks, path)
        for callback in callbacks:
            saved.take_back(callback)

    def mend(self, callbacks: Iterable[Any], checkpointer: Checkpointer) -> None:
        """Give callbacks back what they gave up for saves that have failed by now."""
        ended = [saved for saved in self._under_way if saved.save is not None and saved.save.done()]
        if not ended:
            return
        self._under_way = [saved for saved in self._under_way if saved not in ended]
        callbacks = list(callbacks)
        for saved in reversed(ended):  # what took the place of one that failed may have failed as well
            if saved.save is not None and saved.save.error is not None:
                checkpointer.keep_what_replaced(saved.path)
                for callback in callbacks:
                    saved.take_back(callback)
        self.note(callbacks)

    def _since_note(self, callbacks: Iterable[Any], path: Any) -> _Saved:
        """Return what callbacks have given up since the last note."""
        before = {}
        for callback in callbacks:
            known, now = self._known.get(id(callback), _Known.of(callback)), _Known.of(callback)
            given_up = {path: score for path, score in known.models.items() if path not in now.models}
            before[id(callback)] = known._replace(models=given_up)
        return _Saved(str(path), before)


def _rank_again(callback: Any) -> None:
    """Find best and worst among the models that a ``ModelCheckpoint`` knows, as it does itself."""
    models = callback.best_k_models
    best, worst = (min, max) if callback.mode == "min" else (max, min)
    if models and len(models) == callback.save_top_k:
        callback.kth_best_model_path = worst(models, key=models.get)
        callback.kth_value = models[callback.kth_best_model_path]
    callback.best_model_path = best(models, key=models.get) if models else ""
    callback.best_model_score = models[callback.best_model_path] if models else None
