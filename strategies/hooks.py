"""Hooks that may use what steps collected, which only the last pipeline stage has: of the module and of users' callbacks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from kenotron.strategies import _lightning
from kenotron.strategies.steps import PipelineSteps

HOOKS_WITH_RESULTS = tuple(
    f"on_{stage}_{event}_end" for stage in ("train", "validation", "test") for event in ("batch", "epoch")
)

#: Callbacks from here log what every rank has, or nothing.
_KNOWN = ("lightning", "pytorch_lightning", "kenotron")


class HookRelay:
    """Lets hooks run on all stages, and what they log on the last one count for all.

    Args:
        steps: of the pipeline.
    """

    def __init__(self, names: _lightning.Names, steps: PipelineSteps) -> None:
        self._names, self._steps = names, steps
        self._of_callbacks: list[tuple[Any, str]] = []

    def apply(self, module: Any, callbacks: Iterable[Any]) -> None:
        for name in HOOKS_WITH_RESULTS:
            if self._names.is_overridden(name, module):
                self._relay(module, name)
        for callback in callbacks:
            for name in HOOKS_WITH_RESULTS:
                if getattr(type(callback), name).__module__.partition(".")[0] not in _KNOWN:
                    self._relay(callback, name)
                    self._of_callbacks.append((callback, name))

    def _relay(self, holder: Any, name: str) -> None:
        hook = getattr(holder, name)
        hook = getattr(hook, "_kenotron_original", hook)

        @functools.wraps(hook)
        def relayed(*args: Any, **kwargs: Any) -> Any:
            return self._steps.run_hook(hook, args, kwargs)

        relayed._kenotron_original = hook  # type: ignore[attr-defined]
        holder.__dict__[name] = relayed

    def undo(self) -> None:
        """Give callbacks back their own hooks: they may go to another trainer."""
        for callback, name in self._of_callbacks:
            callback.__dict__.pop(name, None)
        self._of_callbacks.clear()


def hide_example_input(module: Any, trainer: Any, names: _lightning.Names, *, is_cut: bool, is_whole: bool) -> Any:
    """Let neither a summary nor a logger run a module that lives in parts. Returns the example input that it had, if hidden.

    Args:
        is_cut: the module is split into pipeline stages. is_whole: every rank has all of it.
    """
    example = module.example_input_array
    draws_graph = any(getattr(logger, "_log_graph", False) for logger in trainer.loggers)
    if example is None or not (is_cut or (draws_graph and not is_whole)):
        return None
    module.example_input_array = None
    _lightning.warn(
        names,
        "example_input_array is left out: the module runs in steps alone, on all ranks together, so neither its summary nor "
        "TensorBoardLogger(log_graph=True) can run it by itself.",
    )
    return example
