"""After a save: the copy is complete before code that may change weights runs.

An optimizer's step waits by itself (``kenotron.checkpoint.guard``). Of what else Lightning calls, this knows what never writes
weights: Lightning's own callbacks that watch, and Kénotron's. All other code is foreign.

1. ``save_checkpoint`` was called by foreign code, a callback that swaps averaged weights in and out, say: it may change
   weights as soon as the call returns, so the call waits for the copy. So does ``ModelCheckpoint`` under manual optimization,
   where it saves what the module has put into ``saved_models``, and puts its weights back.
2. It was called by ``ModelCheckpoint`` and its like: the call returns at once. Until the next fence each foreign hook of a
   callback or of the module waits for the copy before it begins.

``training_step`` runs beside the copy: what it writes is known from the run's first steps, or found by fingerprints.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from kenotron.checkpoint import Checkpointer

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_PARTS = ("core", "plugins", "profilers", "strategies", "trainer", "utilities")
_WATCHERS = (
    *("callback", "checkpoint", "device_stats_monitor", "early_stopping", "lr_monitor", "model_checkpoint", "model_summary"),
    *("on_exception_checkpoint", "prediction_writer", "progress", "rich_model_summary", "throughput_monitor", "timer"),
)
#: Where functions are defined that change no weights.
_TRUSTED = (
    "kenotron",
    *(f"{package}.{part}" for package in _PACKAGES for part in _PARTS),
    *(f"{package}.callbacks.{name}" for package in _PACKAGES for name in _WATCHERS),
)
#: What else lies between a hook and the save that it calls.
_LIBRARIES = ("contextlib", "functools", "torch", "lightning_utilities", "lightning.fabric", "lightning_fabric")
#: Hooks of a module that are not named `on_…`. What wraps the backward pass or the step (`backward`, `optimizer_step`) is left
#: out: the copy is to go on beside it.
_STEPS = ("validation_step", "test_step", "predict_step", "configure_gradient_clipping", "lr_scheduler_step", "teardown")
#: Hooks that see batches alone, one for each step.
_BATCHES = ("on_before_batch_transfer", "on_after_batch_transfer")


def fence_what_follows(checkpointer: Checkpointer) -> None:
    """Let whatever may change weights wait for the save that ``Trainer.save_checkpoint`` has just begun."""
    trainer, is_foreign = _find_caller(sys._getframe(1))
    if trainer is None or is_foreign or _saves_others(trainer.lightning_module):
        checkpointer.fence()
        return
    placed: list[tuple[dict[str, Any], str, Any]] = []

    def remove() -> None:
        for attributes, name, former in placed:
            if former is None:
                attributes.pop(name, None)
            else:
                attributes[name] = former

    for owner, name in _foreign_hooks(trainer):
        attributes = vars(owner)
        placed.append((attributes, name, attributes.get(name)))
        attributes[name] = _fenced(getattr(owner, name), checkpointer.fence)
    checkpointer.at_next_fence(remove)


def _saves_others(module: Any) -> bool:
    """Tell whether ``ModelCheckpoint`` swaps weights around a save, as Lightning 2.6 does it for modules that kept some."""
    return not module.automatic_optimization and bool(getattr(module, "saved_models", None))


def _find_caller(frame: FrameType | None) -> tuple[Any, bool]:
    """Return the trainer whose ``save_checkpoint`` this is, and whether foreign code called it within a hook or a step."""
    trainer = None
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(tuple(f"{package}.loops" for package in _PACKAGES)):
            return trainer, False
        if frame.f_code.co_name == "save_checkpoint" and module in [f"{package}.trainer.trainer" for package in _PACKAGES]:
            trainer = frame.f_locals["self"]
        if not _is_in(module, (*_TRUSTED, *_LIBRARIES)):
            return trainer, True
        frame = frame.f_back
    return trainer, True


def _foreign_hooks(trainer: Any) -> Iterator[tuple[Any, str]]:
    """Yield who has hooks that may change weights, and their names."""
    module = trainer.lightning_module
    for owner, others in ((module, _STEPS), *((callback, ("teardown",)) for callback in trainer.callbacks)):
        names = {name for name in (*dir(type(owner)), *vars(owner)) if name.startswith("on_")} - {*_BATCHES}
        for name in sorted(names | {*others}):
            hook = getattr(owner, name, None)
            if callable(hook) and not _is_in(str(getattr(hook, "__module__", "")), _TRUSTED):
                yield owner, name


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _fenced(hook: Callable[..., Any], fence: Callable[[], object]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def waits(*args: Any, **kwargs: Any) -> Any:
        fence()
        return hook(*args, **kwargs)

    return waits
